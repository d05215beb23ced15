"""What a report looks like elsewhere: JUnit XML, Markdown, one HTML page."""

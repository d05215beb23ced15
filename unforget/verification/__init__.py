"""Base and candidate side by side: evidence and a verdict."""

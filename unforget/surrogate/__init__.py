"""From a target to the image that takes its place."""

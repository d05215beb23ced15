"""What lies on disk: safetensors and other files, images, patches, the cache."""

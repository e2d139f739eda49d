"""Builds the two images, with what this machine has: Docker, or buildah and its own Debian."""

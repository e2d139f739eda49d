"""A program that says nothing, and doesn't end."""

import time

if __name__ == "__main__":
    time.sleep(600)

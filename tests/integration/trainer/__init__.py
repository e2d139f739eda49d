"""Tests of the trainer on real parts: an S3 server, the Hub's client, llama.cpp, small models."""

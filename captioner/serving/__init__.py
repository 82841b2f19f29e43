"""Captions over HTTP: an engine that batches the images of all requests, and the API in front of it."""

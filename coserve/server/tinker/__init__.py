"""Tinker's training API over HTTP: one file a resource, and what they share."""

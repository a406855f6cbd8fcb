"""Frames in, text or a Figure out. Nothing here computes, and nothing here knows the commands."""

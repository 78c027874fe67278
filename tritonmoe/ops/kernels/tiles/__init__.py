"""Tiles: how a kernel cuts its matrices into the pieces that one program computes."""

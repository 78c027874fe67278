"""What measures, explains and plans runs of the layer; nothing in front of this folder imports from it."""

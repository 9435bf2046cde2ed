"""Saliency maps, class visualization and feature inversion."""

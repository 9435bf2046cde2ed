"""Classifiers built from a namespace of layers."""

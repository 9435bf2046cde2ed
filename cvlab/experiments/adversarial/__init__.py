"""Adversarial attacks on photos."""

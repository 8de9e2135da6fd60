"""Stages of several frameworks as one trainable module."""

"""Turns a corpus release into a prepared dataset."""

"""Tests that speak to a real af_key, in user-mode Linux, and to the embedded kernel of the same profile."""

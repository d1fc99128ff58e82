"""Rendering of the evidence: JSON of autotune, verify and benchmark in, one HTML page and Markdown tables out."""

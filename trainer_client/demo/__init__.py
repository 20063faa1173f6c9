"""The demonstration's training material: a small byte-level model, real text and a base model.

Needs no download: the text is the standard library's own documentation (``pydoc_data.topics``).
"""

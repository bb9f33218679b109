"""Stored objects of each format: from bytes in a store to tensors, and back.

Here formats meet storage: ``torchferry.formats`` says what bytes mean, ``torchferry.engine`` moves them.
"""

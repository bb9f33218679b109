"""torchferry in other libraries, one small file each; none is imported before you do.

The functions of this package know none of these libraries.
"""

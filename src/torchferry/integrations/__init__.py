"""torchferry in other libraries, one small file each; none of these is imported before you import its file."""

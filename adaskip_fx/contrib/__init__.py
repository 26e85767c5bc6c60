"""What few need: parts of other systems that hang on public interfaces.

Nothing imports it but `cli` and whoever asks for it.
"""

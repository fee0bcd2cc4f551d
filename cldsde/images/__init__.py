"""Image models: data, networks, training, metrics and the demonstration on handwritten digits.

Needs the extra ``images``: ``pip install 'cldsde[images]'``.
"""

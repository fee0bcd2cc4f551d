"""Image models: configuration, data, networks, training, sampling, evaluation, demonstration.

Needs the extra ``images``: ``pip install 'cldsde[images]'``.
"""

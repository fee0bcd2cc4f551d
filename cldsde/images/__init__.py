"""Image models: configuration, data, networks, training, sampling, evaluation, comparison.

One folder stands for each step::

    configuration → train → run folder → sample → samples → evaluate → results → compare → report
"""

try:
    from cldsde.images.entry import Run, as_array, as_pictures
except ModuleNotFoundError as error:
    msg = f"cldsde.images needs {error.name}; install it with pip install 'cldsde[images]'"
    raise ModuleNotFoundError(msg, name=error.name) from error

__all__ = ["Run", "as_array", "as_pictures"]

"""What the notebooks and the documentation draw with, on axes of matplotlib.

``matplotlib.pyplot.style.use("bn_jax.lab.figures")`` gives a figure the look of the notebooks.

- `band`, `points`: means over seeds, with their 95 % intervals, as a line or as points;
- `quantile_band`: medians, and how far single values are apart;
- `legend_below`: a legend where no data are;
- `ticks_at`: a logarithmic axis with ticks at the values that were tried.

Example:
    >>> import matplotlib.pyplot as plt
    >>> from bn_jax.lab.figures import band, legend_below
    >>> with plt.style.context("bn_jax.lab.figures"):
    ...     figure, axes = plt.subplots()
    ...     band(axes, [1, 2], [[0.1, 0.2, 0.2], [0.3, 0.5, 0.4]], "batch norm")
    ...     legend_below(axes)
    >>> plt.close(figure)
"""

from bn_jax.lab.experiments.figures import band, legend_below, points, quantile_band, ticks_at

__all__ = ["band", "legend_below", "points", "quantile_band", "ticks_at"]

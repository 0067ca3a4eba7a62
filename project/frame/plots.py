"""Figures as pixels, and their ticks.

Figures are built on :class:`matplotlib.figure.Figure` directly. So pyplot's global state stays empty, no display is
needed, and threads may draw. matplotlib is imported when the first figure is drawn.
"""

import logging
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)


def figure_to_image(figure: "Figure", dpi: int = 100) -> Any:
    """The pixels of a figure as a uint8 array ``[H, W, 3]``, for ``SummaryWriter.add_image(…, dataformats="HWC")``.

    Args:
        figure: figure of matplotlib to draw.
        dpi: pixels per inch of the figure's size, 1 or more.
    """
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with rc_context(_font_for(figure)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _font_for(figure: "Figure") -> dict[Any, Any]:
    """Settings of matplotlib with a font that has all characters of a figure, such as Chinese names of classes."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    for axis in figure.axes:
        axis.get_xticklabels(), axis.get_yticklabels()  # writes their texts
    wanted = {ord(char) for text in figure.findobj(Text) for char in text.get_text()} - {ord("\n")}

    def is_whole(path: str) -> bool:
        return wanted <= font_manager.get_font(path).get_charmap().keys()

    if is_whole(font_manager.findfont(font_manager.FontProperties())):
        return {}
    fonts = font_manager.fontManager.ttflist
    found = [font.name for font in fonts if not font.name.startswith("Last Resort") and is_whole(font.fname)]
    if not found:
        log.warning("No font has all characters of a picture: install one, such as Debian's fonts-noto-cjk.")
    return {"font.sans-serif": found[:1]} if found else {}


def round_ticks(axes: "Axes", span: float) -> None:
    """Label a logarithmic x-axis with round numbers that do not overlap.

    Args:
        axes: axes of matplotlib with a logarithmic x-axis.
        span: greatest value on the x-axis divided by the smallest, at least 1.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if span > 5 else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())

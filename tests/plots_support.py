"""What the tests of the plots share: how to tell that a figure is clean."""

import itertools

from matplotlib.text import Text


def box_of(text):
    return Text.get_window_extent(text)  # An annotation's own extent would include its line.


def texts_of(axes):
    """The labels of points and lines, and of the trivial baseline, with their boxes in pixels."""
    return [(text.get_text(), box_of(text)) for text in axes.texts if text.get_zorder() == 4]


def contains(outer, inner):
    return (outer.extents[:2] <= inner.extents[:2]).all() and (inner.extents[2:] <= outer.extents[2:]).all()


def assert_clean(figure, points=None):
    """No label overlaps another or a point or leaves its axes; no text leaves the figure or meets another panel's.

    `points` are those of each axes in data coordinates (default: those of its scatter plot).
    """
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    for number, axes in enumerate(figure.axes):
        boxes = texts_of(axes)
        own = points[number] if points else axes.collections[0].get_offsets()
        for name, box in boxes:
            assert contains(axes.get_window_extent().padded(0.5), box), f"{name} leaves the axes"
            assert not any(box.contains(*point) for point in axes.transData.transform(own)), f"{name} lies on a point"
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert not a.overlaps(b), f"{one} overlaps {other}"
    whole = figure.bbox.padded(0.5)
    texts = [*figure.texts, *figure.legends]
    for axes in figure.axes:
        left_title, subtitle = axes._left_title, axes.texts[0]
        texts += [axes.title, left_title, subtitle, axes.xaxis.label, axes.yaxis.label]
        assert not left_title.get_window_extent().overlaps(subtitle.get_window_extent())
        ticks = [t for t in axes.get_xticklabels() if t.get_text()]
        for one, other in itertools.pairwise(ticks):
            assert not one.get_window_extent().overlaps(other.get_window_extent()), f"{one} overlaps {other}"
    for text in texts:
        assert contains(whole, text.get_window_extent(renderer)), text
    for one, other in itertools.combinations(figure.axes, 2):
        assert not one.get_tightbbox(renderer).overlaps(other.get_tightbbox(renderer))
        titles = [axes._left_title.get_window_extent() for axes in (one, other)]
        assert not titles[0].overlaps(titles[1])
    legend = figure.legends[0].get_window_extent(renderer)
    assert not any(legend.overlaps(axes.get_tightbbox(renderer)) for axes in figure.axes)
    assert not any(legend.overlaps(text.get_window_extent()) for text in figure.texts)

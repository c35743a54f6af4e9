"""An answer as a chart: lines over time, else bars. SVG or PNG, drawn without a display."""

import io
import threading
import warnings
from typing import Any, Final, Literal

import pyarrow as pa
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from quern.analytics.question import BUCKET, MEASURES, Measure, Question

ChartFormat = Literal["svg", "png"]

#: Colour-blind safe (M. Okabe and K. Ito, "Color Universal Design").
_COLOURS: Final = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000"]
_MOST_SERIES: Final = 8
_MOST_BARS: Final = 25
_LONGEST: Final = 40
#: matplotlib keeps fonts and caches for the whole process.
_lock = threading.Lock()


def chart(question: Question, table: pa.Table, form: ChartFormat, title: str | None = None) -> bytes:
    """Draw an answer: its first number, by its first column; further dimensions become series.

    The same answer gives the same bytes.
    """
    with _lock:
        figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        value = _value(question)
        if table.num_rows == 0:
            axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
        elif BUCKET in table.column_names:
            _lines(axes, question, table, value)
        else:
            _bars(axes, question, table, value)
        axes.set_title(_safe(title or _title(question)), loc="left", fontsize=11, parse_math=False)
        return _drawn(figure, form)


def _drawn(figure: Figure, form: ChartFormat) -> bytes:
    from matplotlib import rc_context

    sink = io.BytesIO()
    # Text stays text, identifiers and dates do not change from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "quern"}), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, and stands in the SVG as itself.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        if form == "svg":
            FigureCanvasSVG(figure).print_svg(sink, metadata={"Date": None, "Creator": None})  # type: ignore[no-untyped-call]
        else:
            FigureCanvasAgg(figure).print_png(sink, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return sink.getvalue()


def _value(question: Question) -> str:
    if question.measure is Measure.COHORTS:
        return "share"
    for name in question.columns:
        if name in ("mean", "sum", "p50", "count", "responses", "similarity", "min", "max", "p75", "p90", "p95", "p99"):
            return _preferred(question) or name
    return question.columns[-1]


def _preferred(question: Question) -> str | None:
    # The count of a mean is not what was asked for.
    return next((name for name in question.columns if name in ("mean", "sum")), None)


def _title(question: Question) -> str:
    by = [*question.dimensions, *([] if question.grain == "all" else [question.grain])]
    return question.measure.value.replace("_", " ") + (f" by {', '.join(by)}" if by else "")


def _safe(text: Any) -> str:
    shown = "–" if text is None else "".join(part if part.isprintable() else "·" for part in str(text))
    return shown if len(shown) <= _LONGEST * 2 else shown[: _LONGEST * 2 - 1] + "…"


def _label(parts: list[Any]) -> str:
    text = ", ".join(_safe(part) for part in parts)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _unit(question: Question, value: str) -> str:
    unit = MEASURES[question.measure].unit
    return f"{value} ({unit})" if unit and value not in ("count", "share") else value


def _lines(axes: Any, question: Question, table: pa.Table, value: str) -> None:
    series: dict[str, tuple[list[Any], list[Any]]] = {}
    keys = [name for name in table.column_names if name in question.dimensions or name == "stage"]
    for row in table.to_pylist():
        x, y = series.setdefault(_label([row[name] for name in keys]) if keys else value, ([], []))
        x.append(row[BUCKET])
        y.append(row[value])
    # The greatest series are shown; how many are not is said.
    ordered = sorted(series.items(), key=lambda item: (-sum(part or 0 for part in item[1][1]), item[0]))
    for place, (name, (x, y)) in enumerate(ordered[:_MOST_SERIES]):
        axes.plot(x, y, color=_COLOURS[place], label=name, marker="." if len(x) < 60 else None, linewidth=1.5)
    axes.set_ylabel(_unit(question, value))
    axes.set_ylim(bottom=0 if all((part or 0) >= 0 for _, (_, y) in ordered for part in y) else None)
    axes.grid(axis="y", alpha=0.3)
    axes.figure.autofmt_xdate()
    if len(ordered) > 1:
        _legend(axes, len(ordered) - _MOST_SERIES)


def _legend(axes: Any, beyond: int) -> None:
    made = axes.legend(fontsize=8, title=f"and {beyond} more" if beyond > 0 else None)
    for text in made.get_texts():
        # A label is data: a dollar sign in it is no formula.
        text.set_parse_math(False)


def _bars(axes: Any, question: Question, table: pa.Table, value: str) -> None:
    shown = {"count", "share", "sum", "mean", "min", "max", "p50", "p75", "p90", "p95", "p99"}
    shown |= {"responses", "occurrences", "members", "similarity", "position"}
    keys = [name for name in table.column_names if name not in shown]
    rows = table.slice(0, _MOST_BARS).to_pylist()
    labels = [_label([row[name] for name in keys]) if keys else question.measure.value for row in rows]
    places = list(range(len(rows)))
    axes.barh(places, [row[value] or 0 for row in rows], color=_COLOURS[0])
    axes.set_yticks(places, labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    beyond = f"; {table.num_rows - _MOST_BARS} more are not shown" if table.num_rows > _MOST_BARS else ""
    axes.set_xlabel(_unit(question, value) + beyond)
    axes.grid(axis="x", alpha=0.3)

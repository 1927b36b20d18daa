"""
A run's log as curves and figures: read, smoothed, drawn as a picture or in the terminal.
"""

import io
import itertools
import math
import os
import statistics
from dataclasses import dataclass

import checkpoint
from configurator import UserError
from files import write_whole
from logs import read_log
from model import Transformer

X_AXES = {'step': 'steps', 'tokens': 'tokens', 'time': 'hours', 'flops': 'FLOPs'}
MARKS = '*+x#@%&=~^'  # of runs in the terminal


@dataclass
class Run:
    """A run's records, of training steps and of evaluations, the FLOPs of a token (0 = not known), and the unit of its loss."""
    name: str
    train: list
    val: list
    flops: float
    unit: str

    def x(self, records, axis):
        """The records' places along an axis: steps, tokens, hours or FLOPs."""
        key = {'step': 'iter', 'time': 'time'}.get(axis, 'tokens')
        scale = {'time': 1 / 3600, 'flops': self.flops}.get(axis, 1)
        return [record[key] * scale for record in records]


def read(folder, last_iter=math.inf):
    """The run in a folder, up to a step. None if it has logged no loss; raises UserError for a log that is damaged."""
    records = [{key: value for key, value in record.items() if math.isfinite(value)}
               for record in read_log(folder, last_iter)]
    found = checkpoint.peek(os.path.join(folder, 'ckpt.pt'))
    flops, unit = 0.0, 'nats per token'
    if found:
        flops = Transformer.without_weights(checkpoint.model_config(found, folder)).flops_per_token()
        unit = 'a pair of answers' if found['config'].get('stage') == 'dpo' else unit
    train, val = ([record for record in records if {key, 'tokens', 'time'} <= record.keys()] for key in ('loss', 'val_loss'))
    return Run(os.path.basename(os.path.normpath(folder)), train, val, flops, unit) if train or val else None


def smooth(values, share):
    """
    The mean of each value and its neighbours, of as many on either side, over a `share` of all: unlike an average of what came
    before, it does not lag behind a falling curve.
    """
    sums, n = [0.0, *itertools.accumulate(values)], len(values)
    reach = round(share * n / 2)
    ends = [(max(i - reach, 0), min(i + reach + 1, n)) for i in range(n)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def import_pyplot(wanted_by):
    """matplotlib's pyplot, drawing into files only. Raises UserError where it is missing."""
    try:
        import matplotlib
        matplotlib.use('agg')
        from matplotlib import pyplot
    except ImportError:
        raise UserError(f'{wanted_by} needs a package: pip install matplotlib') from None
    pyplot.rcParams |= {'axes.grid': True, 'grid.alpha': 0.3, 'axes.spines.top': False, 'axes.spines.right': False,
                        'legend.frameon': False, 'savefig.dpi': 120, 'svg.fonttype': 'none',
                        'text.parse_math': False}
    return pyplot


def save(figure, path):
    """Writes a picture in the form that its name asks for. Raises UserError where that cannot be done."""
    kind = os.path.splitext(path)[1][1:].lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise UserError(f"'{path}': a picture's name ends with .png or .svg")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind)
    try:
        write_whole(path, picture.getvalue())
    except OSError as e:
        raise UserError(f"'{path}' cannot be written ({e.strerror})") from None


def draw(runs, path, axis='tokens', share=0.04):
    """
    Draws losses, learning rate, gradient's norm and throughput of the runs, over `axis`; smoothed over a `share` of each curve.
    Raises UserError without matplotlib, and where the picture cannot be written.
    """
    pyplot = import_pyplot(f'{path}, a picture,')
    from matplotlib.ticker import EngFormatter
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 7.5), layout='constrained', sharex=True,
                                     gridspec_kw={'height_ratios': (2, 1)})
    (losses, norms), (rates, speeds) = panels
    for i, run in enumerate(runs):
        color, x = f'C{i % 10}', run.x(run.train, axis)
        label = f' {run.name}' if len(runs) > 1 else 'training'  # what begins with _ would have no legend
        for panel, key in ((losses, 'loss'), (norms, 'grad_norm'), (speeds, 'tok_per_sec')):
            here = [(at, record[key]) for at, record in zip(x, run.train) if record.get(key, 0) > 0]  # logarithms know no 0
            if here:
                at, values = zip(*here)
                panel.plot(at, values, color=color, alpha=0.25, linewidth=0.8)
                panel.plot(at, smooth(values, share), color=color, linewidth=1.5, label=label)
        rates.plot(x, [record.get('lr', math.nan) for record in run.train], color=color)
        losses.plot(run.x(run.val, axis), [record['val_loss'] for record in run.val], color=color if len(runs) > 1 else 'C1',
                    marker='o', markersize=4, linewidth=1, linestyle='--',
                    label='validation' if run.val and len(runs) == 1 else None)
    units = ' or '.join(dict.fromkeys(run.unit for run in runs))
    losses.set(title=f'loss, {units} (faint: single steps; dots: validation)')
    norms.set(title='norm of the gradient', yscale='log')
    for panel in (rates, speeds):
        if axis != 'time':
            panel.xaxis.set_major_formatter('{x:.3g}' if axis == 'flops' else EngFormatter(sep=''))
    speeds.yaxis.set_major_formatter(EngFormatter(sep=''))
    norms.yaxis.set_major_formatter('{x:g}')
    norms.yaxis.set_minor_formatter('{x:g}')
    rates.set(title='learning rate', xlabel=X_AXES[axis])
    speeds.set(title='tokens per second', xlabel=X_AXES[axis], ylim=(0, None))
    # what the first steps lose, and single spikes, would press the rest into a line
    shown = [record['loss'] for run in runs for record in run.train] + [r['val_loss'] for run in runs for r in run.val]
    settled = sorted(y for run in runs for y in smooth([r['loss'] for r in run.train], share)[len(run.train) // 20:])
    if settled and settled[-1] > min(shown) and max(shown) > 2 * settled[-1] - settled[0]:
        losses.set_ylim(min(shown) - 0.05 * (settled[-1] - min(shown)), settled[-1] + 0.1 * (settled[-1] - min(shown)))
    losses.legend()
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    save(figure, path)
    pyplot.close(figure)


def draw_text(runs, axis='tokens', share=0.04, width=76, height=20):
    """The runs' smoothed training losses, and `o` for their evaluations, as lines of characters."""
    points = []  # (x, y, character)
    for run, mark in zip(runs, MARKS * (len(runs) // len(MARKS) + 1)):
        points += zip(run.x(run.train, axis), smooth([r['loss'] for r in run.train], share), mark * len(run.train))
        points += zip(run.x(run.val, axis), [r['val_loss'] for r in run.val], 'o' * len(run.val))
    ys = sorted(y for _, y, _ in points)
    low, high = ys[0], ys[min(len(ys) - 1, int(0.97 * len(ys)))]  # the first steps would press the rest into a line
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    rows = [[' '] * width for _ in range(height)]
    for x, y, mark in points:
        row = round((high - y) / ((high - low) or 1) * (height - 1))
        if row >= 0:
            rows[row][round((x - left) / ((right - left) or 1) * (width - 1))] = mark
    lines = [f'{high - (high - low) * i / (height - 1):8.3f} |{"".join(row).rstrip()}' for i, row in enumerate(rows)]
    ends = f'{left:,.4g}', f'{right:,.4g} {X_AXES[axis]}'
    legend = [f'{mark} {run.name}' for run, mark in zip(runs, MARKS * (len(runs) // len(MARKS) + 1))]
    return '\n'.join([*lines, ' ' * 9 + '-' * (width + 1), ' ' * 10 + ends[0] + ends[1].rjust(width - len(ends[0])),
                      ' ' * 10 + f'loss, {runs[0].unit}: ' + ', '.join(legend) + ', o validation'])


def figures(runs):
    """The runs' final figures as rows of text, the first being the head; the training loss is the mean of ten logged steps."""
    rows = [('run', 'step', 'tokens', 'train', 'val', 'best val', 'bits/byte', 'tok/s', 'hours')]
    for run in runs:
        val = run.val[-1] if run.val else {}
        newest = max(run.train[-1:] + run.val[-1:], key=lambda record: record['iter'])
        speeds = [record['tok_per_sec'] for record in run.train if 'tok_per_sec' in record]
        rows.append((run.name, f"{newest['iter']:,}", f"{newest['tokens']:,}",
                     f"{statistics.mean(r['loss'] for r in run.train[-10:]):.4f}" if run.train else '',
                     *(f'{value:.4f}' if value is not None else '' for value in (
                         val.get('val_loss'), min((r['val_loss'] for r in run.val), default=None), val.get('val_bpb'))),
                     f'{statistics.median(speeds):,.0f}' if speeds else '', f"{newest['time'] / 3600:.2f}"))
    return rows


def columns(rows):
    """Rows of text as aligned columns: the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
                     for row in rows)

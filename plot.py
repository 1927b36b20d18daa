"""
Draws what runs have logged: losses, learning rate, gradient's norm and throughput, with a table of their last figures.

    python plot.py out/stdlib                                      # writes curves.png
    python plot.py out/a out/b --x=time --picture=a_and_b.svg      # several runs, over hours
    python plot.py out/* --text                                    # in the terminal, without matplotlib

A run that was resumed is one curve. Faint lines are single steps, strong ones their average, dots are evaluations.
"""

from configurator import UserError, configure

# ---- settings
picture = 'curves.png'  # the file to write: .png, .svg or .pdf
x = 'tokens'  # step | tokens | time | flops: what the curves are drawn over
smoothing = 0.04  # share of a curve over which it is averaged; 0 = single steps only
text = False  # draw in the terminal instead
# ----
config = configure(globals(), positional=True)

import os

import curves

if not 0 <= smoothing < 1:
    raise UserError(f'smoothing={smoothing} is not within 0 <= smoothing < 1')
folders = config.positional or ['out/stdlib']
missing = [folder for folder in folders if not os.path.exists(folder)]
if missing:
    raise UserError(f'{missing[0]}: there is no such folder; name those of runs, such as out/stdlib')
runs = [run for folder in folders if os.path.isdir(folder) and (run := curves.read(folder))]
if not runs:
    raise UserError(f'{", ".join(folders)}: there is no log.jsonl with a training step in it; name the --out_dir of a run')
unknown = [run.name for run in runs if not run.flops]
if x == 'flops' and unknown:
    raise UserError(f"x='flops' needs the run's ckpt.pt, which {unknown[0]} lacks; use --x=tokens")
if text:
    print(curves.draw_text(runs, x, smoothing))
else:
    curves.draw(runs, picture, x, smoothing)
    print(f'{picture}: {len(runs)} run{"s" * (len(runs) > 1)} over {curves.X_AXES[x]}')
print(curves.columns(curves.figures(runs)))

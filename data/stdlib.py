"""
The source of Python's own standard library, about 12 MB on every machine that has Python, as bytes; no network needed.

    python prepare.py data/stdlib.py
"""
import platform
import sysconfig

name = 'stdlib'
source = sysconfig.get_path('stdlib')
include = '*.py'
exclude = 'test tests idle_test site-packages dist-packages'
tokenizer = 'bytes'
val_fraction = 0.05
note = f"the standard library of Python {platform.python_version()}, without its tests"

"""
What can go wrong while a run trains: a signal from outside; a loss or a gradient that is not finite, or jumps.
"""

import math
import os
import signal
import threading
import time

EARLY = 20  # steps that are never spikes: the means have to settle
TORCHRUN_REPEATS = 2  # seconds within which torchrun passes a signal on that the terminal has sent already


class Interruption:
    """
    SIGTERM and SIGINT, from now on: the first is kept in `signal` for the loop to see, a second ends the process at once
    with 128 + its number, as a shell has it.
    """

    def __init__(self, say, under_torchrun):
        self.signal, self.time = 0, 0.0  # 0: none came
        self.say, self.under_torchrun = say, under_torchrun
        self.pipe, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._watch, daemon=True).start()  # Python's handlers wait for the end of a backward pass

    def _watch(self):
        while True:
            number = os.read(self.pipe, 1)[0]
            if number not in (signal.SIGINT, signal.SIGTERM):
                continue
            if not self.signal:
                self.signal, self.time = number, time.monotonic()
                self.say(f'{signal.Signals(number).name}: after this step the run saves and stops; a second one stops at once')
            elif not self.under_torchrun or time.monotonic() - self.time > TORCHRUN_REPEATS:
                os._exit(128 + number)


class StepGuard:
    """Tells the steps that must not be taken: loss or gradient are not finite, or are a spike."""

    def __init__(self, max_spike):
        """`max_spike`: how many times its running mean a loss or a gradient's norm may be; 0 = any."""
        self.max_spike = max_spike
        self.state = {'good_steps': 0, 'mean_loss': 0.0, 'mean_grad_norm': 0.0,  # means of the last 50 good steps, about
                      'bad_steps': 0, 'bad_in_row': 0}

    def wrong(self, loss, grad_norm, scaler):
        """Why a step must not be taken; '' if it may."""
        if not math.isfinite(loss):
            return f'loss {loss}'
        if not math.isfinite(grad_norm):  # in float16 the scaler was too bold: it leaves the step out and learns from it
            return '' if scaler.is_enabled() and scaler.get_scale() > 1 else f'gradient norm {grad_norm}'
        if self.max_spike and self.state['good_steps'] >= EARLY:
            for name, value, mean in (('loss', loss, self.state['mean_loss']),
                                      ('gradient norm', grad_norm, self.state['mean_grad_norm'])):
                if value > self.max_spike * mean:
                    return f'{name} {value:.4g} is more than {self.max_spike:g} times its mean of {mean:.4g}'
        return ''

    def record(self, loss, grad_norm, wrong):
        """Updates the running means and the counts of bad steps."""
        state = self.state
        if wrong:
            state['bad_steps'] += 1
            state['bad_in_row'] += 1
        elif math.isfinite(grad_norm):
            state['good_steps'] += 1
            state['bad_in_row'] = 0
            weight = max(1 / state['good_steps'], 0.02)
            state['mean_loss'] += weight * (loss - state['mean_loss'])
            state['mean_grad_norm'] += weight * (grad_norm - state['mean_grad_norm'])

"""The hardware is named right: devices that are there, precision that it computes, and peaks of whole names only."""

import sys

import pytest
import torch

import device
from configurator import UserError


@pytest.mark.parametrize('name, teraflops', [
    ('NVIDIA H200', 989), ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA A10G', 70), ('NVIDIA A10', 125), ('NVIDIA L4', 121), ('NVIDIA L40S', 362), ('Tesla T4', 65),
    ('Tesla V100-SXM2-16GB', 125), ('NVIDIA GeForce RTX 4090', 165), ('NVIDIA RTX A1000', None), ('NVIDIA T400', None)])
def test_peaks(monkeypatch, name, teraflops):
    monkeypatch.setattr(device, 'device_name', lambda _: name)
    assert device.peak_flops('cuda:0') == (teraflops and teraflops * 1e12)
    assert device.peak_flops('cpu') is None


def pretend(monkeypatch, cuda=0, mps=False, capability=(8, 0)):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)


def test_devices(monkeypatch):
    pretend(monkeypatch)
    assert device.pick_device('auto') == device.pick_device('cpu') == device.pick_device('auto', 1, 2) == 'cpu'
    assert device.pick_device('cpu:0') == 'cpu'
    pretend(monkeypatch, mps=True)
    assert device.pick_device('auto') == 'mps' and device.pick_device('auto', 1, 2) == 'cpu'
    pretend(monkeypatch, cuda=2)
    assert device.pick_device('auto') == device.pick_device('cuda') == 'cuda:0'
    assert device.pick_device('auto', 1, 2) == 'cuda:1' and device.pick_device('cuda:1') == 'cuda:1'
    for args, words in ((('mps',), 'sees 0 mps'), (('cuda:2',), 'sees 2 cuda'), (('cuda', 2, 3), 'fewer processes'),
                        (('cuda:0', 0, 2), 'cannot serve 2 processes'), (('gpu',), 'choose auto'), (('cuda:x',), 'cuda:x')):
        with pytest.raises(UserError, match=words):
            device.pick_device(*args)


def test_the_most_that_fit(monkeypatch):
    card = {}

    def run(size):
        card['used'] = 100 + 10 * size
        if card['used'] > card['there']:
            raise torch.OutOfMemoryError('')

    monkeypatch.setattr(device, 'peak_memory', lambda device, reset=False: card['used'])
    monkeypatch.setattr(device, 'memory_limit', lambda device: card['says'])
    for there, says, reserve, result in ((1000, 1000, 0, 80), (1000, 1000, 500, 30), (300, 1000, 0, 20), (125, 125, 0, 1),
                                         (115, 1000, 0, 1), (105, 1000, 0, 0)):
        card.update(there=there, says=says, used=100)
        assert device.most_that_fit([1, 2, 3, 10, 20, 30, 80, 240], run, 'cuda:0', reserve) == result
        assert device.most_that_fit([1], run, 'cuda:0', reserve) == min(result, 1)


def test_memory_that_is_not_known_is_said(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'darwin')
    with pytest.raises(UserError, match='batch_size=auto .* this is cpu on darwin; give it a number'):
        device.memory_limit('cpu')


@pytest.mark.skipif(sys.platform != 'linux', reason='read from /proc')
def test_peak_memory_is_of_what_came_since():
    before = device.peak_memory('cpu', reset=True)
    block = torch.ones(2**25)  # 128 MiB
    assert 100e6 < device.peak_memory('cpu') - before < 300e6
    del block
    assert device.memory_limit('cpu') > 2**30


def test_precision(monkeypatch):
    pretend(monkeypatch, cuda=1)
    assert device.pick_dtype('auto', 'cuda:0') == 'bfloat16'
    pretend(monkeypatch, cuda=1, capability=(7, 0))
    assert device.pick_dtype('auto', 'cuda:0') == 'float16' and device.pick_dtype('float32', 'cuda:0') == 'float32'
    assert device.pick_dtype('auto', 'mps') == 'float32'
    for native in (True, False):
        monkeypatch.setattr(device, 'cpu_computes_bfloat16', lambda native=native: native)
        assert device.pick_dtype('auto', 'cpu') == ('bfloat16' if native else 'float32')

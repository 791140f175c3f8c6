"""The report of a distillation: numbers appear as they were given, and the picture shows what the curves hold."""

import json

import numpy as np
import pytest

from jpt.training import report

TEACHER = report.Scores('teacher', 5_401_856, 3.0, 0.0, 1.0)
DISTILLED = report.Scores('distilled', 1_275_680, 4.0, 0.75, 0.625)
SCRATCH = report.Scores('from scratch', 1_275_680, 4.25, 1.0, 0.5)


def test_table_has_a_row_per_model_and_equal_widths():
    lines = report.table([TEACHER, DISTILLED, SCRATCH]).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0] == ['model', 'parameters', 'loss', 'KL to teacher', 'top-1 agreement']
    assert cells[2] == ['teacher', '5,401,856', '3.0000', '0.0000', '100.00 %']
    assert cells[3] == ['distilled', '1,275,680', '4.0000', '0.7500', '62.50 %']
    assert cells[4][0] == 'from scratch'
    assert set(''.join(cells[1])) == {'-', ':'}


def test_verdict_says_which_way_it_went():
    good = report.verdict(DISTILLED, SCRATCH)
    assert 'distilled is better than from scratch by 0.2500 nats' in good
    assert 'lower by 0.2500' in good
    assert '+12.50 points' in good
    bad = report.verdict(SCRATCH._replace(model='distilled'), DISTILLED._replace(model='from scratch'))
    assert 'worse' in bad
    assert '-12.50 points' in bad


def test_samples_are_grouped_by_prompt():
    samples = [report.Sample(m, p, f'<{m}{p}>') for m in ('a', 'b') for p in ('x', 'y')]
    text = report.sample_text(samples)
    places = [text.index(piece) for piece in ('x<ax>', 'x<bx>', 'y<ay>', 'y<by>')]
    assert places == sorted(places)


def test_read_curve_passes_over_other_lines_and_a_cut_off_end(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    rows = [{'tokens': 10, 'loss': 3.5}, {'tokens': 10, 'eval_loss': 9.0}, {'tokens': 20, 'loss': 3.25}]
    path.write_text('\n'.join(json.dumps(row) for row in rows) + '\n{"tokens": 30, "lo')
    assert report.read_curve(path, 'tokens', 'loss') == report.Curve([10, 20], [3.5, 3.25])
    path.write_text('{"tokens": 1}\nnot json\n{"tokens": 2}\n')
    with pytest.raises(ValueError, match=r'metrics\.jsonl:2: not JSON'):
        report.read_curve(path, 'tokens', 'loss')


def test_smooth_is_the_normalized_weighted_mean():
    values = np.array([4.0, 2.0, 1.0, 7.0])
    weights = 0.9 ** np.arange(3, -1, -1)
    got = report.smooth(values.tolist())
    assert got[0] == pytest.approx(4.0)
    assert got[-1] == pytest.approx(float(weights @ values / weights.sum()))
    assert report.smooth([]) == []


def test_png_shows_a_line_per_curve(tmp_path):
    from matplotlib.image import imread

    low, high = report.Curve([0, 1e6], [2.0, 2.0]), report.Curve([0, 1e6], [4.0, 4.0])
    path = tmp_path / 'new' / 'curves.png'
    report.save_curves(path, {'distilled': low, 'from scratch': high}, teacher_loss=3.0, title='held out')
    image = imread(path)[..., :3]
    assert image.shape == (540, 840, 3)

    def middle_row(color):
        """The row, counted from the top, where the middle of the picture has the color most often."""
        near = np.abs(image[:, 300:540] - np.array(color)).max(axis=-1) < 0.1
        return int(near.sum(axis=1).argmax())

    blue, orange = (0x1F / 255, 0x77 / 255, 0xB4 / 255), (1.0, 0x7F / 255, 0x0E / 255)  # matplotlib's first two
    assert middle_row(orange) < middle_row((0.4, 0.4, 0.4)) < middle_row(blue)

"""The adapter for lm-eval, on a stand-in for its base class: what it is asked, what the model sees, what comes back."""

import abc
import importlib.util
import sys
import types

import pytest
from letters import encode, likes

from jpt.evaluation.harness import generate_until, log_likelihoods, make_adapter, pair_ids, rolling_pieces

BOS = 1


def test_pairs_keep_the_space_with_the_continuation():
    ids, start = pair_ids(encode, BOS, 'one two ', 'three')
    assert bytes(ids).decode() == 'one two three'
    assert bytes(ids[start:]).decode() == ' three'


@pytest.mark.parametrize('adds_bos', [False, True])
def test_without_a_context_every_token_is_predicted(adds_bos):
    def encoded(text):
        return [BOS] * adds_bos + encode(text)

    assert pair_ids(encoded, BOS, '', 'BB') == ([BOS, *encode('BB')], 1)
    pairs = [pair_ids(encoded, BOS, '', 'BB')]
    assert log_likelihoods(likes('B'), pairs, batch_size=1, length=8) == [(pytest.approx(-0.2), True)]


def test_log_likelihoods_lose_context_from_the_front():
    pairs = [(encode('xxBB'), 2), (encode('xxBC'), 2), (encode('x' * 20 + 'BC'), 20)]
    found = log_likelihoods(likes('B'), pairs, batch_size=2, length=8)
    assert found == [(pytest.approx(-0.2), True), (pytest.approx(-5.1), False), (pytest.approx(-5.1), False)]


def test_rolling_pieces_are_those_of_the_harness():
    # The example of lm_eval.api.model: ten tokens, four positions; 8 and 9 are predicted after 5, 6, 7, 8.
    pieces = rolling_pieces(list(range(10, 20)), BOS, 4)
    assert [(piece.tolist(), skipped) for piece, skipped in pieces] == [
        ([BOS, 10, 11, 12, 13], 0),
        ([13, 14, 15, 16, 17], 0),
        ([15, 16, 17, 18, 19], 2),
    ]
    assert rolling_pieces([BOS, 10], BOS, 4)[0][0].tolist() == [BOS, 10]  # not twice
    assert rolling_pieces([], BOS, 4) == []


class Result:
    def __init__(self, text):
        self.text = text


class Model:
    """Continues every prompt with its own length, and keeps what it was asked."""

    config = types.SimpleNamespace(max_length=16)

    def __init__(self):
        self.asked = []
        template = types.SimpleNamespace(
            source='TEMPLATE', render=lambda messages, add_generation_prompt: f'{len(messages)}{add_generation_prompt}'
        )
        self.tokenizer = types.SimpleNamespace(
            adds_bos=False,
            bos_id=BOS,
            source='folder',
            encode=lambda text, bos: encode(text),
            chat_template=lambda name='default': template,
        )

    def generate(self, prompts, **options):
        self.asked.append((prompts, options))
        return [Result(str(len(prompt))) for prompt in prompts]


def test_requests_of_equal_options_are_one_batch():
    model = Model()
    greedy = {'until': ['\n'], 'do_sample': False, 'temperature': 0.7, 'max_gen_toks': 6}
    drawn = {'until': 'Q:', 'do_sample': True, 'temperature': 0.7, 'top_p': 0.9}
    requests = [('ab', greedy), ('abc', drawn), ('x' * 30, dict(greedy))]
    assert generate_until(model, encode, requests, 4, 16) == ['2', '1', '10']
    (first, one), (second, two) = model.asked
    assert [len(prompt) for prompt in first] == [2, 10]  # 16 positions, 6 of them for the answer
    assert one == {'max_new_tokens': 6, 'stop': ('\n',), 'batch_size': 4, 'temperature': 0.0}
    assert [len(prompt) for prompt in second] == [1]
    assert two == {'max_new_tokens': 15, 'stop': ('Q:',), 'batch_size': 4, 'temperature': 0.7, 'top_p': 0.9}
    with pytest.raises(ValueError, match=r"generate_until: \['num_beams'\]: expected until"):
        generate_until(model, encode, [('a', {'num_beams': 4})], 1, 16)


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ({'do_sample': True, 'top_p': 0.9}, {'temperature': 1.0, 'top_p': 0.9}),
        ({'do_sample': True, 'temperature': None}, {'temperature': 1.0}),
        ({'temperature': None, 'top_p': None, 'until': None}, {'temperature': 0.0}),
        ({'do_sample': None, 'temperature': 0.3}, {'temperature': 0.3}),
    ],
)
def test_sampling_that_is_asked_for_without_a_temperature_has_temperature_1(given, expected):
    model = Model()
    generate_until(model, encode, [('ab', given | {'max_gen_toks': 2})], 1, 16)
    assert model.asked[0][1] == {'max_new_tokens': 2, 'stop': (), 'batch_size': 1} | expected


def test_the_adapter_is_a_model_of_the_harness(monkeypatch):
    class LM(abc.ABC):  # the abstract methods of lm_eval.api.model.LM
        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def loglikelihood_rolling(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

    for name in ('lm_eval', 'lm_eval.api', 'lm_eval.api.model'):
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        module.LM = LM
        monkeypatch.setitem(sys.modules, name, module)
    adapter = make_adapter(Model(), likes('B'), batch_size=2, length=100)
    assert isinstance(adapter, LM)

    def asked(*arguments):
        return types.SimpleNamespace(args=arguments)

    assert adapter.loglikelihood([asked('Which? ', 'B')]) == [(pytest.approx(-5.1), False)]  # the space, and B
    assert adapter.loglikelihood_rolling([asked('B' * 40), asked('C')]) == [pytest.approx(-4.0), pytest.approx(-5.0)]
    assert adapter.generate_until([asked('abc', {'until': ['\n'], 'max_gen_toks': 4})]) == ['3']
    assert adapter.apply_chat_template([{'role': 'user', 'content': 'a'}]) == '1True'
    assert (adapter.chat_template(), adapter.chat_template(True), adapter.tokenizer_name) == ('', 'TEMPLATE', 'folder')


def test_without_the_harness_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='pip install lm-eval'):
        make_adapter(Model(), likes('B'))

"""Chat templates: what of them is used is what stock tokenizers write, and what they may take has an end."""

import time

import pytest
from conftest import rewrite
from pipelines import tiny_flux2, tiny_sana, tiny_z_image, words

from unforget import families
from unforget.errors import CannotRun
from unforget.families import chat

HOW = {"add_generation_prompt": True, "enable_thinking": False}
QWEN = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- else %}{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content }}{%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
"""Of the form that Qwen3's has."""
PROMPTS = ["", "a red square", " spaces ", "{{ 7 * 7 }} {% for %}", "two\nlines", "\u4e2d\U0001f600", "<tool>x</tool>"]


def put(template, prompt, **how):
    tokens = words(chat_template=template)
    chat.bound(tokens, "tokenizer")
    return tokens.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, **{**HOW, **how})


@pytest.mark.parametrize("thinking", [True, False])
def test_a_prompt_is_put_as_the_stock_tokenizer_does(thinking):
    stock = words(chat_template=QWEN)
    for prompt in PROMPTS:
        chats = [{"role": "user", "content": prompt}]
        wanted = stock.apply_chat_template(chats, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        assert put(QWEN, prompt, enable_thinking=thinking) == wanted


def test_a_template_may_use_the_tokens_marks():
    assert put("{{ eos_token }}{{ messages[0].content }}", "a") == "</s>a"


LOOPS = "{% for a in range(9999) %}" * 5 + "{{ messages[0].content }}" + "{% endfor %}" * 5
HUNGRY = {
    "nested loops": LOOPS,
    "loops that write nothing": LOOPS.replace("{{ messages[0].content }}", ""),
    "a long text": "{{ messages[0].content * 10 ** 11 }}",
    "a constant": "{{ 'a' * 10 ** 11 }}{{ messages[0].content }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "doubling": "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 40 + "{{ messages[0].content }}",
    "a filter": "{{ messages[0].content | center(10 ** 11) }}",
    "a format": "{{ '{:>99999999999}'.format(messages[0].content) }}",
    "words": "{{ lipsum(n=10 ** 7) }}{{ messages[0].content }}",
    "long output": "{% for a in range(9999) %}0123456789{% endfor %}{{ messages[0].content }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{{ messages[0].content }}",
    "depth": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}{{ messages[0].content }}",
}


FAST = ("nested loops", "a constant", "doubling", "recursion")


@pytest.mark.parametrize("template", [
    pytest.param(t, id=name, marks=() if name in FAST else pytest.mark.slow) for name, t in HUNGRY.items()
])  # fmt: skip
def test_whatever_a_template_computes_has_an_end(template):
    begun = time.monotonic()
    with pytest.raises(CannotRun, match=r"chat template of 'tokenizer' (takes|does not work)") as caught:
        put(template, "a red square")
    assert caught.value.hint and len(caught.value.message) < 400
    assert time.monotonic() - begun < chat.WAIT


def test_a_template_does_nothing_of_its_own_with_a_prompt_that_it_waited_for():
    """What it was tried on is all that it ever sees."""
    trap = "{% if 'victim' in messages[0].content %}" + LOOPS + "{% endif %}{{ messages[0].content }}!"
    assert put(trap, "a victim") == "a victim!"


@pytest.mark.parametrize("template", [
    "{{ messages[0].content | trim }}", "no prompt", "{{ messages[0].content }}{{ messages[0].content }}", "{% if",
    "{{ raise_exception('no') }}",
])  # fmt: skip
def test_a_template_that_does_not_put_every_prompt_as_it_is(template):
    with pytest.raises(CannotRun, match=r"does not (put every prompt|work: .)"):
        put(template, "a red square")


def test_more_than_one_prompt_is_refused():
    tokens = words(chat_template=QWEN)
    chat.bound(tokens, "tokenizer")
    one = {"role": "user", "content": "a"}
    for chats, how in (
        ([one, one], {"tokenize": False}), ([{**one, "role": "system"}], {"tokenize": False}), ([one], {}), ([], {}),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {"tokenize": False}),
    ):  # fmt: skip
        with pytest.raises(CannotRun, match="more than one prompt"):
            tokens.apply_chat_template(chats, **how)


@pytest.mark.parametrize("make", [
    pytest.param(tiny_flux2, id="flux2-klein", marks=pytest.mark.slow), pytest.param(tiny_z_image, id="z-image"),
])  # fmt: skip
def test_a_model_with_such_a_template_is_refused_before_any_work(make, tmp_path):
    make().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer" / "chat_template.jinja"
    kept = file.read_text()
    file.write_text(LOOPS)
    with pytest.raises(CannotRun, match="the chat template of 'tokenizer' takes too long"):
        families.load(str(tmp_path / "model"))
    file.unlink()
    rewrite(file.with_name("tokenizer_config.json"), chat_template=LOOPS)  # where older versions wrote it
    with pytest.raises(CannotRun, match="the chat template of 'tokenizer' takes too long"):
        families.load(str(tmp_path / "model"))
    rewrite(file.with_name("tokenizer_config.json"), chat_template=kept)
    families.load(str(tmp_path / "model"))


def test_a_template_that_nobody_asks_for_does_not_matter(tmp_path):
    """Gemma's refuses a system's role and trims; Sana never uses it."""
    tiny_sana().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer" / "chat_template.jinja").write_text(LOOPS)
    families.load(str(tmp_path / "model"))

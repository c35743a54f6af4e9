"""Templates: text from values, and no way to anything else."""

import tracemalloc

import pytest

from quern.workflows import template

VALUES = {
    "answers": {"name": "Ada", "items": "three", "list": ["a", "b"], "rating": 2, "long": "x" * 40_000},
    "response": {"id": "rsp_1"},
}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("Dear {{ answers.name }},\n", "Dear Ada,\n"),
        ("{{ answers['name']|upper }}", "ADA"),
        ("{{ answers.items }}", "three"),
        ("{{ answers.list|join(', ') }} {{ answers.list[0] }}", "a, b a"),
        ("{{ answers.nobody|default('friend') }}", "friend"),
        ("{{ answers.name[:2] }}", "Ad"),
        ("{% if answers.rating < 3 and answers.name is defined %}low{% else %}high{% endif %}", "low"),
        ("{{ 'yes' if 'a' in answers.list else 'no' }}", "yes"),
        ("{{ answers.name|replace('A', 'I') }}", "Ida"),
        ("{{ 2.345|round(1) }}", "2.3"),
        ("{# nothing #}{{ '{{' }}", "{{"),
    ],
)
def test_what_a_template_can_say(source: str, text: str) -> None:
    assert template.render(template.check(source), VALUES) == text


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ answers.__class__ }}",
    "{{ answers['__class__'] }}",
    "{{ answers.name.__init__.__globals__ }}",
    "{{ answers|attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ answers.items.__call__ }}",
    "{{ 'a'.format }}",
    "{{ self }}",
    "{{ self.__init__ }}",
    "{{ request }}",
    "{{ config }}",
    "{{ lipsum }}",
    "{{ namespace }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_leads_to_python(source: str) -> None:
    with pytest.raises((ValueError, template.RenderError)):
        template.render(template.check(source), VALUES)


REFUSED = [
    "{{ ().__class__() }}",
    "{{ cycler() }}",
    "{{ 'a'.join(['b']) }}",
    "{% for i in answers.list %}{{ i }}{% endfor %}",
    "{% macro m() %}{% endmacro %}",
    "{% set a = 1 %}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% block b %}{% endblock %}",
    "{% filter upper %}x{% endfilter %}",
    "{% call m() %}{% endcall %}",
    "{% with a = 'xx' %}{{ a }}{% endwith %}",
    "{{ 'x' * 1000000000 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ '%1000000000s' % 'x' }}",
    "{{ 'x' ~ 'y' }}",
    "{{ 'x' + 'y' }}",
    "{{ answers|tojson }}",
    "{{ answers.list|map('upper') }}",
    "{{ 'x'|center(1000000000) }}",
    "{{ 'x'|format('y') }}",
    "{{ 7 is divisibleby 3 }}",
    "{{ answers.name",
    "{% if 1 %}",
    "{{ " + "not " * 2000 + "1 }}",
    "{{ a" + "[0]" * 1500 + " }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
]


@pytest.mark.parametrize("source", REFUSED, ids=range(len(REFUSED)))
def test_what_could_call_or_use_up_the_process_is_refused_when_it_is_written(source: str) -> None:
    with pytest.raises(ValueError, match=r"^(line|not a template)"):
        template.check(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ answers.long }}{{ answers.long }}",
        "{{ answers.long|replace('x', answers.long) }}",
        "{{ answers.list|join(answers.long)|replace('x', 'xx') }}",
        "{{ answers.long|e|replace('x', answers.long) }}",
        "{{ 1|round(1000000000, 'ceil') }}",
    ],
)
def test_a_text_that_would_grow_without_bound_is_not_made(source: str) -> None:
    """Not even for a moment, in memory."""
    tracemalloc.start()
    try:
        with pytest.raises(template.RenderError):
            template.render(template.check(source), VALUES)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_an_answer_is_never_a_template() -> None:
    values = {"answers": {"name": "{{ 7 * 7 }}{% for x in y %}"}}
    assert template.render("{{ answers.name }}", values) == "{{ 7 * 7 }}{% for x in y %}"


def test_an_error_says_nothing_of_the_values() -> None:
    with pytest.raises(template.RenderError) as caught:
        template.render("{{ answers.name.first.last }} {{ answers.secret.x }}", {"answers": {"name": "Ada Lovelace"}})
    assert "Ada" not in str(caught.value)

"""Go's text/template as the export to Ollama writes it. What each template writes was taken from Go 1.27 itself, and is
compared with Go again where there is one."""

import json
import os
import shutil
import subprocess

import pytest

from lorakit.export.go_expression import GoTemplateError, go_text
from lorakit.export.go_template import GoTemplate

DATA = {
    "Messages": [
        {"Role": "system", "Content": ""},
        {"Role": "user", "Content": " Hi {{ .X }} \n"},
        {"Role": "assistant", "Content": "é你😀"},
    ],
    "System": "S",
}
WRITTEN = {
    "plain } text {": "plain } text {",
    "a {{ .System }} b": "a S b",
    "a \n {{- .System -}} \t b": "aSb",
    "a {{-/* no comment: no space */ -}} b": None,
    "a {{- /* a comment */ -}} b": None,
    "{{- define `x` }} {{ . }} {{ end -}} |{{ template `x` .System }}|": "| S |",
    '{{ "\\t\\n\\"\\\\\\u00e9\\U0001F600\\xc3\\xa9" }}': '\t\n"\\é😀é',
    '{{ `raw \\n "}}"` }}': 'raw \\n "}}"',
    "{{ range .Messages }}<{{ .Role }}>{{ end }}": "<system><user><assistant>",
    "{{ range $m := .Messages }}<{{ $m.Role }}{{ .Role }}>{{ end }}": "<systemsystem><useruser><assistantassistant>",
    "{{ range $i, $m := .Messages }}{{ if eq $i 1 }}{{ $m.Content }}{{ end }}{{ end }}": " Hi {{ .X }} \n",
    "{{ range $i, $m := .Messages }}{{ if eq (len (slice $.Messages $i)) 1 }}{{ .Role }}{{ end }}{{ end }}": (
        "assistant"
    ),
    "{{ range (slice .Messages 3) }}no{{ else }}none{{ end }}": "none",
    "{{ $x := `a` }}{{ if true }}{{ $x = `b` }}{{ end }}{{ $x }}": "b",
    "{{ $x := `a` }}{{ if true }}{{ $x := `b` }}{{ end }}{{ $x }}": "a",
    "{{ $x := `` }}{{ range .Messages }}{{ $x }},{{ $x = .Role }}{{ end }}{{ $x }}": ",system,user,assistant",
    "{{ range .Messages }}{{ if eq .Role `tool` }}t{{ else if .Content }}c{{ else }}e{{ end }}{{ end }}": "ecc",
    "{{ if `` }}a{{ else if false }}b{{ else if 0 }}c{{ else }}d{{ end }}": "d",
    "{{ if not (slice .Messages 3) }}empty{{ end }}": "empty",
    "{{ and `a` `` `b` }}|{{ or `` `x` `y` }}|{{ or `` `` }}": "|x|",
    "{{ if and .System (eq .System `S`) }}y{{ end }}": "y",
    "{{ if or true (index .Messages `never looked at`) }}y{{ end }}": "y",
    "{{ if eq `c` `a` `b` `c` }}y{{ end }}{{ if ne 1 2 }}n{{ end }}": "yn",
    "{{ if ge (len .System) 1 }}y{{ end }}{{ if ge 0 1 }}n{{ end }}": "y",
    "{{ $c := (index .Messages 2).Role }}{{ $c }}": None,
    "{{ $m := index .Messages 2 }}{{ slice $m.Content 0 2 }}|{{ slice $m.Content 2 }}": "é|你😀",
    "{{ $m := index .Messages 2 }}{{ if eq (len $m.Content) 9 }}bytes{{ end }}": "bytes",
    "{{ slice `abc` 0 (len (slice `abc` 1)) }}{{ slice `abc` (len (slice `abc` 1)) }}": "abc",
    "{{ define `f` }}{{ if . }}<{{ slice . 0 1 }}{{ template `f` (slice . 1) }}>{{ end }}{{ end }}"
    "{{ template `f` `ab` }}": "<a<b>>",
}
FAILING = {
    "{{ range .Messages }}": "end",
    "{{ end }}": "end",
    "{{ if }}a{{ end }}": "",
    "{{ .System": "",
    "{{ nothing .System }}": "nothing",
    "{{ $x }}": "$x",
    "{{ if true }}{{ $x := `a` }}{{ end }}{{ $x }}": "$x",
    "{{ template `gone` . }}": "gone",
    "{{ .Messages.Gone }}": "Gone",
    '{{ "\\q" }}': "",
    "{{ range .System }}{{ end }}": "range",
    "{{ index .Messages `why it is refused` }}": "cannot index slice/array",
    "{{ index .Messages 3 }}": "out of range",
    "{{ slice `abc` 2 1 }}": "",
    "{{ slice `abc` 4 }}": "out of range",
    "{{ eq `1` 1 }}": "incompatible types",
    "{{ if (eq `1` `1` }}a{{ end }}": "",
}


@pytest.mark.parametrize(("source", "written"), [pair for pair in WRITTEN.items() if pair[1] is not None])
def test_a_template_writes_what_go_writes(source, written):
    assert GoTemplate(source).render(DATA) == written


@pytest.mark.parametrize("source", [source for source, written in WRITTEN.items() if written is None])
def test_what_go_may_write_but_the_export_never_does_is_refused(source):
    with pytest.raises(GoTemplateError):
        GoTemplate(source).render(DATA)


@pytest.mark.parametrize(("source", "says"), FAILING.items())
def test_what_fails_in_go_fails_here(source, says):
    with pytest.raises(GoTemplateError) as error:
        GoTemplate(source).render(DATA)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "text", ["", '"quotes" \\n', "line\nbreak\t\r", "{{ .Content }} }}", "é 你 😀", "\u00a0\u2028\x1c\x7f"]
)
def test_a_text_in_quotes_is_written_as_it_is(text):
    quoted = go_text(text)
    assert quoted.isprintable()
    assert GoTemplate(f"{{{{ {quoted} }}}}").render({}) == text


PROGRAM = """
package main

import ("bytes"; "encoding/json"; "os"; "text/template")

type Message struct{ Role, Content string }
type Data struct { Messages []*Message; System string }

func main() {
	var sources []string
	var data Data
	json.Unmarshal([]byte(os.Args[1]), &sources)
	json.Unmarshal([]byte(os.Args[2]), &data)
	written := make([]*string, len(sources))
	for at, source := range sources {
		parsed, err := template.New("").Parse(source)
		if err != nil { continue }
		var b bytes.Buffer
		if parsed.Execute(&b, map[string]any{"Messages": data.Messages, "System": data.System}) == nil {
			text := b.String()
			written[at] = &text
		}
	}
	json.NewEncoder(os.Stdout).Encode(written)
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="there is no Go here")
def test_go_itself_agrees(tmp_path):
    (tmp_path / "main.go").write_text(PROGRAM)
    sources = {**WRITTEN, **dict.fromkeys(FAILING)}
    command = ["go", "run", "main.go", json.dumps([*sources]), json.dumps(DATA)]
    environment = os.environ | {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local", "GO111MODULE": "off"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    differing = [
        (source, ours, its)
        for (source, ours), its in zip(sources.items(), json.loads(done.stdout), strict=True)
        if ours != its and not (source in WRITTEN and ours is None)
    ]
    assert not differing

"""Who may be let in, what is hidden, what contradicts itself, and that flag, variable and file agree."""

from pathlib import Path

import pytest

from patchsight_serve.settings import ServeSettings, is_loopback


def parse(*argv: str) -> ServeSettings:
    return ServeSettings.from_command_line("patchsight-serve", argv)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.2", False), ("example.org", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_beyond_loopback_needs_a_key_or_the_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--host", "0.0.0.0")
    assert caught.value.code == 2
    assert "PATCHSIGHT_API_KEYS" in capsys.readouterr().err
    assert parse("--host", "0.0.0.0", "--allow-anonymous").keys == ()
    monkeypatch.setenv("PATCHSIGHT_API_KEYS", " ,")
    with pytest.raises(SystemExit):
        parse("--host", "0.0.0.0")
    monkeypatch.setenv("PATCHSIGHT_API_KEYS", "one, two")
    assert parse("--host", "0.0.0.0").keys == ("one", "two")
    monkeypatch.delenv("PATCHSIGHT_API_KEYS")
    monkeypatch.setenv("PATCHSIGHT_ALLOW_ANONYMOUS", "1")
    assert parse("--host", "0.0.0.0").allow_anonymous


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSIGHT_API_KEYS", "very-secret")
    settings = parse()
    assert "very-secret" not in settings.describe() + repr(settings)
    assert "api_keys = **********" in settings.describe()


@pytest.mark.parametrize(
    ("content", "message"),
    [('api_keys = ["very-secret"]', "api_keys: Input should be a valid string"),
     ('api_keys = "very-secret"\nmax_images = 300', "error: max_images 300 can never enter")],
)  # fmt: skip
def test_keys_are_not_shown_where_something_is_wrong(
    content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("patchsight.toml").write_text(f"[serve]\n{content}\n")
    with pytest.raises(SystemExit):
        parse()
    said = capsys.readouterr().err
    assert message in said
    assert "very-secret" not in said


def test_flag_over_environment_over_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("patchsight.toml").write_text("[serve]\nport = 1\nmax_batch = 2\nmax_images = 3\n")
    monkeypatch.setenv("PATCHSIGHT_PORT", "4")
    monkeypatch.setenv("PATCHSIGHT_MAX_BATCH", "5")
    settings = parse("--port", "6")
    assert (settings.port, settings.max_batch, settings.max_images, settings.max_queue) == (6, 5, 3, 256)


def test_a_request_must_be_able_to_enter_the_queue(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--max-images", "300")
    assert "max_images 300 can never enter a queue of max_queue 256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8001", "http://127.0.0.1:8000", "grpc://host", "grpc://a b:1", "grpc://"]
)
def test_an_address_that_is_no_tritons(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ServeSettings.from_command_line("patchsight-serve", ["--triton", address])
    assert stopped.value.code == 2
    assert "write grpc://HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["grpc://127.0.0.1:8001", "grpcs://triton.models.svc:8001", "grpc://[::1]:8001"])
def test_an_address_of_triton(address: str) -> None:
    assert ServeSettings(triton=address).triton == address


def test_a_batch_is_as_large_as_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert ServeSettings().batch == 16
    assert ServeSettings(threads=1).batch == 4
    assert ServeSettings(device="cuda").batch == 32
    assert ServeSettings(device="cuda", max_batch=7).batch == 7


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("milvus://host:19530/photos", ("http://host:19530", "photos")),
        ("milvus://10.0.0.1:19530", ("http://10.0.0.1:19530", "patchsight")),
        ("milvuss://[::1]:1/", ("https://[::1]:1", "patchsight")),
        ("some/folder/my.db", ("some/folder/my.db", "patchsight")),
    ],
)
def test_where_galleries_are(value: str, expected: tuple[str, str]) -> None:
    assert parse("--gallery", value).milvus == expected
    assert parse().milvus is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["milvus://host"], "write milvus://HOST:PORT/NAME"),
        (["milvus://host:1/a_b"], "write milvus://HOST:PORT/NAME"),
        (["http://host:1/a"], "write milvus://HOST:PORT/NAME"),
        (["my.sqlite"], "or the path of a file NAME.db"),
        (["milvus://root:secret@host:1/a"], "PATCHSIGHT_GALLERY_TOKEN"),
        (["my.db", "--processes", "2"], "a file of milvus-lite is for one process, not for 2"),
    ],
)
def test_where_galleries_cannot_be(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--gallery", *argv)
    said = capsys.readouterr().err
    assert message in said
    assert "secret" not in said
    assert parse("--gallery", "milvus://host:1/a", "--processes", "2").processes == 2


def test_the_token_of_milvus_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSIGHT_GALLERY_TOKEN", "root:very-secret")
    settings = parse("--gallery", "milvus://host:1/a")
    assert settings.gallery_token.get_secret_value() == "root:very-secret"
    assert "very-secret" not in settings.describe() + repr(settings)

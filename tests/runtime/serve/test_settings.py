# SPDX-License-Identifier: Apache-2.0
"""Settings: four sources in order, and refusals that name the setting and never a key."""

from ipaddress import ip_network

import pytest

from ltxrt.errors import RequestError
from ltxrt.serve.auth import Keys
from ltxrt.serve.settings import load_settings

KEYED = {"api_keys": "a"}


def test_flags_over_environment_over_file_over_defaults(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nslots = 2\nmax_queued = 3\napi_keys = ["x", "y"]\n')
    loaded = load_settings({"port": 10, "slots": None}, {"LTXRT_PORT": "20", "LTXRT_SLOTS": "30"}, file)
    assert (loaded.port, loaded.slots, loaded.max_queued, loaded.host) == (10, 30, 3, "127.0.0.1")
    assert loaded.keys() == ("x", "y")


def test_text_from_the_environment():
    environment = {
        "LTXRT_NO_AUTH": "true",
        "LTXRT_DEVICES": "0, 1",
        "LTXRT_FETCH_NETWORKS": "10.0.0.0/8,fd00::/8",
        "LTXRT_RETENTION_SECONDS": "1.5",
    }
    loaded = load_settings({}, environment, None)
    assert (loaded.no_auth, loaded.devices, loaded.retention_seconds) == (True, ("0", "1"), 1.5)
    assert loaded.fetch_networks == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({}, "api_keys"),
        ({"no_auth": True, "host": "0.0.0.0"}, "no_auth"),
        ({"no_auth": True, "host": "example.com"}, "no_auth"),
        ({**KEYED, "port": 70000}, "port"),
        ({**KEYED, "slots": "many"}, "slots"),
        ({**KEYED, "colour": "red"}, "colour"),
        ({**KEYED, "fetch_networks": "10.0.0.1/8"}, "fetch_networks"),
        ({**KEYED, "log_level": "loud"}, "log_level"),
        ({"api_keys": 5}, "api_keys"),
        ({**KEYED, "ray": "true"}, "redis"),
        ({**KEYED, "redis": "localhost:6379"}, "redis"),
        ({**KEYED, "ray_min_replicas": 2}, "ray_min_replicas"),
        ({**KEYED, "ray_target_ongoing": 0}, "ray_target_ongoing"),
    ],
)
def test_refusals(flags, field):
    with pytest.raises(RequestError) as error:
        load_settings(flags, {}, None)
    assert error.value.field == field


def test_the_address_of_redis_is_not_shown():
    with pytest.raises(RequestError) as error:
        load_settings({**KEYED, "redis": "http://:pass-word@host"}, {}, None)
    assert "pass-word" not in str(error.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_no_auth_on_loopback(host):
    assert load_settings({"no_auth": True, "host": host}, {}, None).no_auth


def test_key_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    assert load_settings({"api_key_file": str(file)}, {}, None).keys() == ("one", "two")
    file.write_text("\n")
    for path in (file, tmp_path / "missing"):
        with pytest.raises(RequestError, match="api_key_file"):
            load_settings({"api_key_file": str(path)}, {}, None).keys()


def test_broken_file(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text("port = ")
    for path in (file, tmp_path / "missing"):
        with pytest.raises(RequestError, match="config"):
            load_settings(KEYED, {}, path)


def test_keys():
    keys = Keys(("one", "two"))
    assert keys.owner("Bearer one") == keys.owner("Key one") == keys.owner("bearer  one")
    assert keys.owner("Bearer one") != keys.owner("Bearer two")
    for wrong in (None, "", "one", "Bearer", "Bearer three", "Basic one", "Bearer \udcff", "Bearer one two"):
        assert keys.owner(wrong) is None
    assert Keys(()).owner(None) == "anyone"

"""What the hub's client raises, as one line that says what to do."""

import pytest
import requests
from huggingface_hub import HfApi, errors

from dvla.common.hub import hub_files
from dvla.errors import UserError


def raised(kind: type[Exception]) -> Exception:
    if not issubclass(kind, errors.HfHubHTTPError) or kind is errors.LocalEntryNotFoundError:
        return kind("it is so\nand a long story")
    answer = requests.Response()
    answer.status_code = 401
    return kind("401 Client Error. (Request ID: Root=1)\n\nand a long story", response=answer)


@pytest.mark.parametrize(
    ("kind", "meaning"),
    [
        (errors.RepositoryNotFoundError, "there is none of that name, or it is private"),
        (errors.GatedRepoError, "its owner grants access on request"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError, "it is not in the cache, and the hub cannot be reached"),
        (OSError, "from the hub: it is so"),
    ],
)
def test_an_error_of_the_hub_is_one_line(monkeypatch, kind, meaning):
    def refuse(*args, **kwargs):
        raise raised(kind)

    monkeypatch.setattr(HfApi, "list_repo_files", refuse)
    with pytest.raises(UserError, match=f"'owner/push' is not a local folder and could not be .*{meaning}") as caught:
        hub_files("owner/push")
    assert "\n" not in str(caught.value) and "long story" not in str(caught.value)

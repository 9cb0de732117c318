"""Fixtures of the tests that deploy."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def deployed(prefect_backend):
    """A client of the test server, with the deployments of prefect.yaml; they are taken away again.

    Not for the session: their trigger would start a run for every checkpoint that other tests announce.
    """
    # Not at the top: Prefect, imported while pytest collects, would log to a stream that is closed later.
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    from deployments import bootstrap

    bootstrap.create_work_pool()
    bootstrap.create_work_pool()
    bootstrap.deploy_all(ROOT)
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=["ptq"]))
    with get_client(sync_client=True) as client:
        yield client
        for deployment in client.read_deployments(deployment_filter=ours):
            client.delete_deployment(deployment.id)
        # The triggers too: Prefect leaves the automation of a deployment that is deleted.
        for automation in client.request("POST", "/automations/filter", json={}).json():
            client.delete_automation(automation["id"])
        client.delete_work_pool(bootstrap.POOL)

"""Fixtures of the tests that deploy."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def deployed(prefect_backend):
    """A client of the test server, with the deployments of prefect.yaml; they are taken away again."""
    # Not at the top: Prefect, imported while pytest collects, would log to a stream that is closed later.
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    from deployments import bootstrap
    from deployments.automations import automations

    bootstrap.create_work_pool()
    bootstrap.create_work_pool()
    bootstrap.deploy_all(ROOT)
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=["ptq"]))
    with get_client(sync_client=True) as client:
        yield client
        for deployment in client.read_deployments(deployment_filter=ours):
            client.delete_deployment(deployment.id)
        for automation in automations():
            for known in client.read_automations_by_name(automation.name):
                client.delete_automation(known.id)
        client.delete_work_pool(bootstrap.POOL)

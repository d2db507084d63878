"""How Ray's proxy chooses a replica: a conversation goes where its prefix is, everything else where least is to do.

Loaded in the proxy, so it must stay free of the model.
"""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from internlm2.serve.conversation import choose


class ConversationRouter(RequestRouter):
    """Asks `choose`; the key is the session of Ray's, which comes from the header that `ConversationHeader` writes."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas to try, by rank; of one rank Ray takes the least loaded."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Ray asks again without a pause
        everyone = random.sample(candidate_replicas, len(candidate_replicas))  # ties go to the first
        key = pending_request.metadata.session_id
        loads = await self._loads(everyone) if key else {}
        if not loads:
            return [everyone]
        chosen = choose(key, loads)
        # The second rank is for a replica that takes no more, or has just died.
        return [[each for each in everyone if each.replica_id.unique_id == chosen], everyone]

    async def _loads(self, replicas: list[RunningReplica]) -> dict[str, int]:
        """Open requests of each replica that answers, from Ray's own count where that is fresh."""
        loads: dict[str, int] = {}
        unknown: list[RunningReplica] = []
        for replica in replicas:
            load = self._replica_queue_len_cache.get(replica.replica_id)
            if load is None:
                unknown.append(replica)
            else:
                loads[replica.replica_id.unique_id] = load
        for replica, load in await self._probe_queue_lens(unknown, 0):
            if load is not None:
                loads[replica.replica_id.unique_id] = load
        return loads

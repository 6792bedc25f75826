"""Sessions against a model, whatever comes in which order: bounds hold, and what is promised is what is held."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from gateway.agents import recognition
from gateway.agents.pauses import PauseModel
from gateway.agents.sessions import Sessions
from gateway.agents.trajectories import MAX_DEPTH
from gateway.routing.types import Hints, Placement

B = 4
MAX_SESSIONS, MAX_TOKENS, IDLE_S = 6, 300, 50.0
names = st.sampled_from([None, None, "a", "b", "c", "d", "e"])


class Machine(RuleBasedStateMachine):
    turns = Bundle("turns")

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint_tokens, recognition.CHECKPOINT_TOKENS = recognition.CHECKPOINT_TOKENS, B
        self.sessions = Sessions(MAX_SESSIONS, MAX_TOKENS, PauseModel(IDLE_S, max_kinds=8))
        self.now_s = 0.0

    @rule(
        target=turns,
        name=names,
        parent=names,
        # Few texts, so that they go on with each other, fork, and are the same.
        text=st.lists(st.sampled_from([[1] * B, [2] * B, [3] * 3]), min_size=1, max_size=12),
        agent=st.sampled_from([None, "x", "y"]),
        tool=st.sampled_from([None, "t", "u"]),
        is_last=st.booleans(),
        tenant=st.sampled_from([None, "s"]),
    )
    def arrives(self, name, parent, text, agent, tool, is_last, tenant):
        # As `Tenant.cap` does: a tenant's names are its own.
        own = {key: value and f"{tenant}-{value}" for key, value in (("session", name), ("parent", parent))}
        hints = Hints(agent=agent, tool=tool, is_last=is_last, tenant=tenant, **own)
        salt = tenant
        prompt = [token for part in text for token in part]
        arrival = self.sessions.arrives(hints, prompt, B, salt, self.now_s)
        assert (arrival.name is None) == (arrival.view is None)
        return arrival.name, prompt

    @rule(turn=turns, prefill=st.sampled_from([None, "p1", "p2"]), decode=st.sampled_from(["d1", "d2"]))
    def placed(self, turn, prefill, decode):
        self.sessions.placed(turn[0], Placement(prefill, decode, "policy", "reason"))

    @rule(turn=turns, num_written=st.integers(0, 10), tool=st.sampled_from([None, "t", "u"]))
    def ended(self, turn, num_written, tool):
        self.sessions.ended(turn[0], self.now_s, [2] * num_written, 0.5, tool)

    @rule(turn=turns)
    def dropped(self, turn):
        self.sessions.dropped(turn[0], self.now_s)

    @rule(name=names, tenant=st.sampled_from([None, "s"]))
    def refused(self, name, tenant):
        self.sessions.refused(Hints(session=name and f"{tenant}-{name}", tenant=tenant), self.now_s)

    @rule(passed_s=st.sampled_from([0.1, 10.0, IDLE_S + 1]))
    def time_passes(self, passed_s):
        self.now_s += passed_s

    @invariant()
    def bounds_hold(self):
        known = self.sessions._sessions
        assert len(known) <= MAX_SESSIONS
        num_tokens = sum(session.prompt.num_tokens for session in known.values())
        assert num_tokens == self.sessions._prompts.total
        with_prompt = [name for name, session in known.items() if session.prompt.num_tokens]
        assert num_tokens <= MAX_TOKENS or len(with_prompt) == 1
        assert set(with_prompt) == set(self.sessions._prompts._owners) <= set(known)
        assert set(known) == set(self.sessions._by_use._owners)
        assert len(self.sessions.pauses) <= 8

    @invariant()
    def promises_are_those_of_known_sessions(self):
        promises = [session.promise for session in self.sessions._sessions.values() if session.promise]
        for replica_id in ("d1", "d2"):
            held = sum(promise.num_tokens for promise in promises if promise.replica_id == replica_id)
            assert self.sessions.promised_tokens(replica_id) == held >= 0

    @invariant()
    def what_recognises_sessions_belongs_to_known_ones(self):
        known = self.sessions._sessions
        tips = {(tip, name) for name, session in known.items() for tip in session.tips}
        assert tips == {(tip, name) for tip, owners in self.sessions._tips._owners.items() for name in owners}
        assert set(self.sessions._beginnings._owners.values()) <= set(known)

    @invariant()
    def trees_are_trees(self):
        members = {name: session.member for name, session in self.sessions._sessions.items()}
        for member in members.values():
            assert len(list(member.waiting())) <= MAX_DEPTH
            of_trajectory = [other for other in members.values() if other.trajectory is member.trajectory]
            assert member.trajectory.num_sessions == len(of_trajectory)
            parent = member.parent
            if parent is not None and parent.is_known:
                assert parent in of_trajectory
                assert parent.depth < member.depth <= MAX_DEPTH

    def teardown(self):
        recognition.CHECKPOINT_TOKENS = self.checkpoint_tokens
        self.now_s += 10 * IDLE_S
        for name in list(self.sessions._sessions):
            while (session := self.sessions._sessions.get(name)) and session.num_running:
                self.sessions.ended(name, self.now_s, [], 0.0, None)
        self.now_s += 10 * IDLE_S
        self.sessions.arrives(Hints(), [1], B, None, self.now_s)
        assert len(self.sessions) == len(self.sessions._tips) == len(self.sessions._beginnings) == 0
        assert self.sessions.promised_tokens("d1") == self.sessions.promised_tokens("d2") == 0
        assert self.sessions._prompts.total == len(self.sessions._by_use) == 0


TestSessions = Machine.TestCase
TestSessions.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)

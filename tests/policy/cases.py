"""What the tests of policy ask about."""

from strongroom.policy.engine import Query, Resource, Situation, Subject

TINY = Resource("acme/tiny@1", max_holders=10, max_copies=5, max_copiers=3, frozen=False)


def someone(*roles, path="user/ana", teams=(), person=None, suspended=False):
    return Subject(path, roles, teams, person or path, suspended=suspended)


def ask(action, *roles, resource=TINY, **situation):
    return Query(someone(*roles), action, resource, Situation(**situation))

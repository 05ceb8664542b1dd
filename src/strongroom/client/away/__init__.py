"""A served room as a gateway elsewhere has it (docs/adr/0015-a-gateway-away-from-the-room.md): what it asks of the
custodian, and says to it, as a principal that may relay.

    room         `AwayRoom`, which is all of it: what a worker of the gateway has in place of the room's folder
    line         one signed request, and what it means that the room refuses the gateway
    callings     who calls, asked once for all who ask at that moment
    accounts     what was answered, said to the log
    draws        bits of budgets, drawn before an answer; tallies of verified inference
    settlements  bits that are charged or given back after it
"""

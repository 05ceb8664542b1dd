"""The only door for everybody without a lease: OpenAI-compatible, every field validated, every bit metered
(spec/gateway.md).

Where is what, in the order in which a request meets it:

    serving, worker, beside, listen    processes; what one worker is made of; its socket
    handshakes, connection, heads,     a client's connection: TLS, HTTP/1.1 and what need not be read again, one
      exchange, deadline, leaving,       request and its answer, times, who goes before the answer, certificates in
      certificates                       place of keys
    generations                        which settings a request is answered under
    app, flight, routes                a request from its first byte to its record; what may end it; where it may go
    door, rooms                        who calls and what each may: the room's word, and the room itself, in a folder
                                         or (strongroom.client.away) served
    request, answer                    bodies, validated and written anew, on the way in and on the way out
    tolls, limits, limits_redis,       what is taken before and settled after: limits, budgets (strongroom.watch),
      filters, spelt                     what is let through, and what tokens spell
    queue, upstream, probe             inference servers: whose turn it is, the client, whether they are there
    verified                           answers that are run again
    records, refusals, appending,      what is kept of a request; what was asked and answered, sealed, and opened again
      capture, unsealing
    refusal, openapi, metrics,         what others are told: errors, the API, figures, spans
      tracing
    settings; reload, hangup,          the settings; new ones while it runs, and what they change
      workers, changes

Elsewhere: the command (strongroom.cli.gateway), the routes of a served room for gateways away from it
(strongroom.server.relays), and what the log's verifier checks of their accounts (strongroom.ledger.streams).
"""

"""Conversations that chat templates are rendered with. Imports nothing of the project."""

TOOLS = [
  {
    "type": "function",
    "function": {
      "name": "get_weather",
      "description": "The weather at a place, é <now> & 'then'.",
      "parameters": {
        "type": "object",
        "properties": {
          "place": {"type": "string", "description": "City, country"},
          "days": {"type": "integer", "enum": [1, 3, 7]},
        },
        "required": ["place"],
      },
    },
  },
  {
    "type": "function",
    "function": {
      "name": "now",
      "description": "The time.",
      "parameters": {"type": "object", "properties": {}},
    },
  },
]
DOCUMENTS = [{"title": "Tides", "text": "High at six."}, {"title": "Ebb", "text": "Low at noon."}]
_USER = {"role": "user", "content": "Hi <b> & é\n  two  "}
_CALL = {
  "role": "assistant",
  "content": "",
  "tool_calls": [
    {
      "id": "abcdefgh1",
      "type": "function",
      "function": {"name": "get_weather", "arguments": {"place": "Zürich", "days": 3}},
    }
  ],
}
_RESULT = {
  "role": "tool",
  "name": "get_weather",
  "tool_call_id": "abcdefgh1",
  "content": '{"sky": "rain"}',
}
_TALK = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "2+2?"},
  {"role": "assistant", "content": "4"},
  {"role": "user", "content": "3+3?"},
]
_REASONED = [
  *_TALK[:2],
  {"role": "assistant", "content": "4.", "reasoning_content": "Two and two.\nFour."},
  _TALK[3],
]

CONVERSATIONS: dict[str, dict] = {
  "hello": {"messages": [_USER]},
  "no prompt": {"messages": [_USER], "add_generation_prompt": False},
  "talk": {"messages": _TALK},
  "talk ends": {
    "messages": [*_TALK, {"role": "assistant", "content": "6"}],
    "add_generation_prompt": False,
  },
  "tools": {"messages": [_USER], "tools": TOOLS},
  "tools and system": {"messages": _TALK, "tools": TOOLS},
  "call": {"messages": [_TALK[0], _USER, _CALL, _RESULT], "tools": TOOLS},
  "called": {
    "messages": [_USER, _CALL, _RESULT, {"role": "assistant", "content": "Rain."}, _TALK[3]],
    "tools": TOOLS,
  },
  "call without content": {
    "messages": [_USER, {**_CALL, "content": None}, _RESULT],
    "tools": TOOLS[:1],
  },
  "documents": {"messages": [_USER], "documents": DOCUMENTS},
  "reasoning": {"messages": _REASONED},
  "reasoning by another name": {
    "messages": [*_TALK[:2], {"role": "assistant", "content": "4.", "thinking": "Two."}, _TALK[3]]
  },
  "thinking off": {"messages": _REASONED, "enable_thinking": False},
  "thinking on": {"messages": _TALK, "enable_thinking": True},
  "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi "}]}]},
  "two users": {"messages": [_USER, _USER]},
}
SPECIAL = {"bos_token": "<BOS>", "eos_token": "<EOS>", "date_string": "26 Jul 2024"}

// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/verb_call.h"

#include "coordinator/cli/status_json.h"

namespace strait::cli {

absl::StatusOr<json::Object> ReadVerbLine(std::string_view text, std::string_view route,
                                          VerbLine* line) {
  STRAIT_ASSIGN_OR_RETURN(const json::Value value, json::Parse(text, route));
  STRAIT_ASSIGN_OR_RETURN(const json::Object* object, json::AsObject(value, route));
  STRAIT_ASSIGN_OR_RETURN(line->event, json::GetString(*object, "event", route));
  if (const json::Value* error = json::Find(*object, "error"); error && error->is_object()) {
    line->error_code = Text(error->get_object(), "code");
    line->error_message = Text(error->get_object(), "message");
  }
  return *object;
}

}  // namespace strait::cli

# SPDX-License-Identifier: Apache-2.0
# Shared by deploy/quickstart.sh and tests/run.sh (sourced, bash): packages, build, messages.
#
#   strait_say TEXT…            a line that starts with the seconds since the script began
#   strait_need_packages GROUP… installs what is missing of these groups of deploy/packages.txt
#   strait_build PRESET TARGET… configures the preset once and builds the targets, with progress; tests are part of
#                               the configuration only if strait_tests=ON, since they need more packages
#
# Needs: STRAIT_ROOT (the repository's root).

strait_say() { printf '\033[1m[%4ds]\033[0m %s\n' "$SECONDS" "$*"; }
[ -t 1 ] || strait_say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }

strait_fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

strait_packages_of() {  # groups… -> names, one a line
  local group
  for group in "$@"; do
    sed -n "s/^$group  *//p" "$STRAIT_ROOT/deploy/packages.txt"
  done
}

strait_installed() {
  [ "$(dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | head -n 1)" = installed ]
}

# BOOST_LIB_VERSION of the headers in use is 1_75 or more. Debian 12 has 1.74 under the plain name, which
# excludes libboost1.81-dev; Ubuntu 24.04 has 1.83 there.
strait_boost_present() {
  local header version
  for header in /usr/include/boost/version.hpp /usr/local/include/boost/version.hpp; do
    [ -r "$header" ] || continue
    version="$(sed -n 's/^#define BOOST_VERSION \([0-9]*\).*/\1/p' "$header")"
    [ "${version:-0}" -ge 107500 ] && return 0
  done
  return 1
}

strait_boost_package() {
  local name version best=
  for name in libboost-dev libboost1.81-dev libboost1.83-dev libboost1.88-dev; do
    version="$(apt-cache policy "$name" 2>/dev/null | sed -n 's/^  Candidate: //p')"
    [ -n "$version" ] && [ "$version" != "(none)" ] || continue
    if dpkg --compare-versions "$version" ge 1.75; then best="$name"; break; fi
  done
  printf '%s\n' "${best:-libboost1.81-dev}"
}

strait_missing_packages() {
  local name
  for name in $(strait_packages_of "$@"); do
    if [ "$name" = boost ]; then
      strait_boost_present || printf 'boost\n'
    else
      strait_installed "$name" || printf '%s\n' "$name"
    fi
  done
}

strait_need_packages() {
  if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    strait_say "This is not Debian or Ubuntu, so nothing is installed for you. Needed, by Debian's names:"
    strait_packages_of "$@" | sed 's/^boost$/Boost headers 1.75 or newer/' | sed 's/^/    /'
    strait_say "Going on: the build says which of them it does not find."
    return 0
  fi
  local missing as_root=
  missing="$(strait_missing_packages "$@")"
  if [ -z "$missing" ]; then
    strait_say "All needed packages are there."
    return 0
  fi
  if [ "$(id -u)" -ne 0 ]; then
    as_root=sudo
    command -v sudo >/dev/null ||
      strait_fail "packages are missing and this is neither root nor is there sudo. As root, run:
    apt-get install $(echo $missing | sed 's/\<boost\>/libboost1.81-dev/')"
  fi
  strait_say "Installing:" $missing
  export DEBIAN_FRONTEND=noninteractive
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null ||
    strait_say "apt-get update had errors; trying with the package lists that are there."
  case " $(echo $missing) " in
    *" boost "*) missing="$(echo " $(echo $missing) " | sed "s/ boost / $(strait_boost_package) /")" ;;
  esac
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      -o Dpkg::Use-Pty=0 $missing </dev/null |
    grep --line-buffered -E '^(Get:|Unpacking|Setting up|E:)' |
    awk -v tty="$([ -t 1 ] && echo 1)" '
      { n++ }
      tty { printf "\r\033[K    %s", substr($0, 1, 100); fflush() }
      !tty && n % 50 == 1 { print "    " $0; fflush() }
      END { if (tty) printf "\r\033[K" }'
  [ "${PIPESTATUS[0]}" -eq 0 ] || strait_fail "apt-get could not install: $(echo $missing)"
  missing="$(strait_missing_packages "$@")"
  [ -z "$missing" ] || strait_fail "still missing after apt-get install: $(echo $missing)"
}

strait_build() {
  local preset="$1"
  shift
  local folder="$STRAIT_ROOT/build/$preset" log="$STRAIT_ROOT/build/$preset-configure.log"
  mkdir -p "$STRAIT_ROOT/build"
  local tests="${strait_tests:-OFF}"
  # What was configured with tests serves without them too.
  if [ ! -f "$folder/build.ninja" ] ||
     { [ "$tests" = ON ] && ! grep -q '^STRAIT_TESTS:BOOL=ON$' "$folder/CMakeCache.txt"; }; then
    strait_say "Configuring build/$preset"
    if ! (cd "$STRAIT_ROOT" && cmake --preset "$preset" -DSTRAIT_TESTS="$tests") >"$log" 2>&1 </dev/null; then
      tail -n 30 "$log" >&2
      rm -f "$folder/build.ninja"
      strait_fail "CMake could not configure the $preset preset; all of its output: $log"
    fi
  fi
  strait_say "Building build/$preset ($(nproc) at a time)"
  # Ninja rewrites its line on a terminal. Without one a line a step is too much: every 25th is shown.
  if [ -t 1 ]; then
    NINJA_STATUS='    [%f/%t, %es] ' ninja -C "$folder" "$@" </dev/null ||
      strait_fail "the build failed; the errors are above"
  else
    NINJA_STATUS='    [%f/%t, %es] ' ninja -C "$folder" "$@" </dev/null 2>&1 |
      awk '/^    \[[0-9]+\// { split($0, a, /[\[\/]/); if (a[2] % 25 == 0 || /FAILED/) print; fflush(); next }
           { print; fflush() }'
    [ "${PIPESTATUS[0]}" -eq 0 ] || strait_fail "the build failed; the errors are above"
  fi
}

"""The script that tells what a board is and how it does; `board_probe` reads what it says.

It is plain POSIX sh, for busybox too, changes nothing, and says a line `key=value` per fact.
Whatever a value holds, it is one line: line breaks become spaces.
"""

from __future__ import annotations

# $1: folder in whose place / is read (tests), $2: where bundles are installed, $3: a program, $4:
# names of programs with spaces between them.
# Files are read with `read`: no process is started for each of a hundred cores.
SCRIPT = r"""
LC_ALL=C
export LC_ALL
root=$1
folder=$2
program=$3
tools=$4
cpus=$root/sys/devices/system/cpu
break='
'
say() {
    value=$2
    case $value in
    *"$break"*) value=$(printf '%s' "$value" | tr '\n' ' ') ;;
    esac
    printf '%s=%s\n' "$1" "$value"
}
first_line() {
    line=
    { IFS= read -r line <"$1"; } 2>/dev/null
    say "$2" "$line"
}
there() {
    command -v -- "$1" >/dev/null 2>&1
}

echo edgepress-probe=1
machine=$(uname -m)
say machine "$machine"
say kernel "$(uname -r)"

for loader in "$root"/lib/ld-*.so* "$root"/lib64/ld-*.so*; do
    [ -e "$loader" ] || continue
    name=${loader##*/}
    say loader "${loader#"$root"}"
    case $name in
    ld-linux-aarch64.so.1) triple=aarch64-linux-gnu ;;
    ld-linux-armhf.so.3) triple=arm-linux-gnueabihf ;;
    ld-linux.so.3) triple=arm-linux-gnueabi ;;
    ld-linux-x86-64.so.2) triple=x86_64-linux-gnu ;;
    ld-musl-*)
        case $machine,$name in
        aarch64,*-aarch64.so.1 | x86_64,*-x86_64.so.1 | armv*,*-arm*.so.1)
            say musl "$("$loader" --version 2>&1)" ;;
        esac
        continue ;;
    *) continue ;;
    esac
    beside=$(readlink -f "$loader")
    for libc in "${beside%/*}" "$root/lib/$triple" "$root/usr/lib/$triple" "$root/lib64" \
        "$root/usr/lib64" "$root/lib" "$root/usr/lib"; do
        [ -f "$libc/libc.so.6" ] || continue
        say glibc "$(tr '\000' '\n' <"$libc/libc.so.6" 2>/dev/null |
            sed -n 's/^GNU C Library .*release version \([0-9.]*[0-9]\).*/\1/p')"
        break
    done
done
there getconf && say getconf "$(getconf GNU_LIBC_VERSION 2>/dev/null)"
there ldd && say ldd "$(ldd --version 2>&1)"

first_line "$root/proc/device-tree/model" board
first_line "$root/sys/firmware/devicetree/base/model" board
first_line "$root/sys/class/dmi/id/product_name" board
sed -n -e 's/^processor[^:]*:[[:space:]]*/processor=/p' \
    -e 's/^CPU implementer[^:]*:[[:space:]]*/implementer=/p' \
    -e 's/^CPU part[^:]*:[[:space:]]*/part=/p' "$root/proc/cpuinfo" 2>/dev/null
echo
sed -n -e 's/^flags[^:]*:/features=/p' -e 's/^Features[^:]*:/features=/p' \
    -e 's/^model name[^:]*:/model name=/p' -e 's/^Processor[^:]*:/Processor=/p' \
    -e 's/^Hardware[^:]*:/Hardware=/p' "$root/proc/cpuinfo" 2>/dev/null | sort -u
echo
first_line "$cpus/online" online
for cpu in "$cpus"/cpu[0-9]*; do
    say core "${cpu##*/cpu}"
    first_line "$cpu/cpu_capacity" capacity
    first_line "$cpu/cpufreq/cpuinfo_max_freq" highest
    first_line "$cpu/cpufreq/scaling_cur_freq" frequency
    first_line "$cpu/cpufreq/scaling_governor" governor
done
for zone in "$root"/sys/class/thermal/thermal_zone[0-9]*; do
    first_line "$zone/temp" temperature
done

for gpu in "$root"/dev/nvidia[0-9]* "$root"/dev/nvhost-gpu "$root"/dev/nvgpu/igpu[0-9]*; do
    [ -e "$gpu" ] && say gpu "${gpu#"$root"}"
done

throttled=$(vcgencmd get_throttled 2>/dev/null)
case $throttled in
throttled=*) say throttled "${throttled#throttled=}" ;;
*)
    for flags in "$root"/sys/devices/platform/*:firmware/get_throttled \
        "$root"/sys/devices/platform/*/*:firmware/get_throttled; do
        [ -e "$flags" ] && first_line "$flags" throttled
    done ;;
esac
for sensor in "$root"/sys/class/hwmon/hwmon[0-9]*; do
    { read -r name <"$sensor/name"; } 2>/dev/null || continue
    [ "$name" = rpi_volt ] && first_line "$sensor/in0_lcrit_alarm" undervoltage
done

sed -n -e 's/^MemTotal:[[:space:]]*/memory total=/p' \
    -e 's/^MemAvailable:[[:space:]]*/memory available=/p' \
    -e 's/^MemFree:[[:space:]]*/memory free=/p' "$root/proc/meminfo" 2>/dev/null
echo
first_line "$root/proc/uptime" uptime
first_line "$root/proc/loadavg" load

[ -n "$folder" ] || folder='~/edgepress'
case $folder in
'~/'*) folder=${HOME%/}/${folder#'~/'} ;;
esac
say folder "$folder"
for link in "$folder"/*; do
    [ -h "$link" ] || continue
    say deployed "${link##*/}"
    say version "$(readlink "$link")"
done
near=$folder
while [ -n "$near" ] && [ ! -e "$near" ]; do
    case $near in
    */*) near=${near%/*} ;;
    *) near= ;;
    esac
done
near=${near:-/}
[ -d "$near" ] && [ -w "$near" ] && say writable yes
say disk "$(df -P -k "$near" 2>/dev/null | sed 1d)"
sed -n 's/^[^ ]* \([^ ]*\) [^ ]* \([^ ]*,\)*noexec[, ].*/noexec=\1/p' \
    "$root/proc/mounts" 2>/dev/null
echo

for tool in $tools; do
    there "$tool" && say tool "$tool"
done
case $(mv -T /proc/edgepress-absent /proc/edgepress-none 2>&1) in
*edgepress-absent*) say tool 'mv -T' ;;
esac
[ -n "$program" ] && there "$program" && say program "$program"
echo edgepress-end=1
"""

"""The scripts that keep versions of bundles on a board.

They need sh and the commands of `TOOLS`, as busybox has them. Each may end at any command, by a
broken link or a lost power supply, and be run again from its start.
"""

from __future__ import annotations

TOOLS = "cat chmod cp dd df head ln ls mkdir mv readlink rm rmdir sha256sum sleep sync touch wc"

# How scripts end, beside 0, and 1 where a command failed and said why on standard error.
NOT_HELD, MOVED, CUT, DAMAGED, NO_HOME, LACKS_TOOLS, HELD, GONE, FOREIGN = range(70, 79)

# sha256sum gets its file on standard input: it prints other names differently.
_BEGIN = """LC_ALL=C; export LC_ALL
digest() { set -- $(sha256sum <"$1"); digest=${1:-}; }
"""

# $1 is the folder of the store, as the user wrote it.
_RESOLVE = f"""
root=$1
case $root in
"~" | "~/"*)
    [ -n "${{HOME:-}}" ] || exit {NO_HOME}
    root=${{HOME%/}}${{root#"~"}} ;;
.) root=$PWD ;;
/*) ;;
*) root=$PWD/$root ;;
esac
store=$root/.edgepress
"""

# $1 is the absolute folder, $2 what its lock says while it is ours.
_HELD = f"""
root=$1 store=$1/.edgepress token=$2 held=
read -r held 2>/dev/null <"$store/lock/holder"
[ "$held" = "$token" ] || exit {NOT_HELD}
shift 2
"""

# $2: a name, or nothing. $3: a version whose files are checked, or nothing.
LOOK = (
    _BEGIN
    + _RESOLVE
    + f"""
name=$2 checked=$3 lacking=
for tool in {TOOLS}; do
    command -v "$tool" >/dev/null || lacking="$lacking $tool"
done
[ -z "$lacking" ] || {{ echo "$lacking"; exit {LACKS_TOOLS}; }}
"""
    + """
for folder in "$store"/*; do
    case ${folder##*/} in *.*) continue ;; esac
    [ -f "$folder/SHA256SUMS" ] || continue
    printf 'version %s\\n' "${folder##*/}"
    while IFS= read -r line; do printf 'file %s\\n' "$line"; done <"$folder/SHA256SUMS"
done
if [ -n "$checked" ] && [ -f "$store/$checked/SHA256SUMS" ]; then
    while IFS= read -r line; do
        digest "$store/$checked/${line#*  }" 2>/dev/null
        [ "$digest" = "${line%%  *}" ] || printf 'damaged %s\\n' "${line#*  }"
    done <"$store/$checked/SHA256SUMS"
    touch "$store/$checked" 2>/dev/null
fi
for file in "$store"/incoming/*; do
    [ -f "$file" ] && printf 'incoming %s %s\\n' $(wc -c <"$file") "${file##*/}"
done
if [ -n "$name" ]; then
    at=$root/$name
    if [ -f "$root/manifest.json" ] && [ -f "$root/weights.epw" ]; then
        echo "name inside"
    elif [ -L "$at" ]; then
        printf 'name link %s\\n' "$(readlink "$at")"
    elif [ -d "$at" ] && [ -f "$at/manifest.json" ]; then
        echo "name folder"
        for file in "$at"/* "$at"/golden/*; do
            [ -f "$file" ] || continue
            digest "$file"
            printf 'older %s  %s\\n' "$digest" "${file#"$at"/}"
        done
    elif [ -d "$at" ]; then
        if [ -z "$(ls -A "$at")" ]; then echo "name empty"; else echo "name foreign"; fi
    elif [ -e "$at" ]; then
        echo "name foreign"
    fi
    if [ -f "$store/$name.previous" ]; then
        while read -r line; do printf 'previous %s\\n' "$line"; done <"$store/$name.previous"
    fi
fi
folder=$root
while [ ! -d "$folder" ]; do
    folder=${folder%/*}
    [ -n "$folder" ] || folder=/
done
{ df -Pk "$folder" 2>/dev/null || df -k "$folder"; } |
    while read -r line; do printf 'df %s\\n' "$line"; done
printf 'root %s' "$root"
"""
)

# Bytes of all files of version $1 but $2.
SIZE = """
cd "$1" || exit 1
bytes=0
for file in * */*; do
    [ ! -f "$file" ] || [ "$file" = "$2" ] || bytes=$((bytes + $(wc -c <"$file")))
done
echo "$bytes"
"""

# $2: what the lock will say. $3: what locks of the same deployment begin with. $4: whose it is.
# $5: seconds without a beat after which a holder is dead. $6: likewise before its first one.
# $7: seconds to wait for a living one.
LOCK = (
    _BEGIN
    + _RESOLVE
    + """
token=$2 same=$3 who=$4 dead_s=$5 first_s=$6 patience_s=$7
lock=$store/lock new=$store/$2.lock unfinished=0 failures=0
[ -d "$root" ] || echo made
boot=unknown
read -r boot 2>/dev/null </proc/sys/kernel/random/boot_id
while :; do
    mkdir -p "$store" 2>/dev/null
    up=0
    read -r up rest 2>/dev/null </proc/uptime
    up=${up%%.*}
    if mkdir "$lock" 2>/dev/null; then
        printf '%9s\\n' $((up - dead_s + first_s)) >"$lock/beat" &&
            printf '%s\\n' "$token" "$boot" "$up" "$who" >"$lock/holder.new" &&
            mv "$lock/holder.new" "$lock/holder" && break
        rm -rf "$lock" # somebody took it for the dead one that was here; or the disk is full
        failures=$((failures + 1))
        [ "$failures" -gt 9 ] || continue
        exit 1
    fi
    if [ ! -d "$lock" ]; then # it was let go of right now, and empty folders with it; or no disk
        failures=$((failures + 1))
        [ "$failures" -gt 9 ] || continue
        mkdir -p "$lock" && continue
        exit 1
    fi
    held= held_boot= since=0 held_by= beat=0
    {
        read -r held
        read -r held_boot
        read -r since
        read -r held_by
    } 2>/dev/null <"$lock/holder"
    read -r beat 2>/dev/null <"$lock/beat"
    case $held in
    "") unfinished=$((unfinished + 1)) dead=$((unfinished > 3)) ;;
    "$same"*) dead=1 ;;
    *)
        unfinished=0 dead=$((up - ${beat:-0} > dead_s))
        [ "$held_boot" = "$boot" ] || dead=1 ;;
    esac
    if [ "$dead" = 1 ]; then
        # Whoever is first to rename it may take it over; what was renamed is looked at again.
        mv "$lock" "$new" 2>/dev/null || continue
        moved=
        read -r moved 2>/dev/null <"$new/holder"
        [ "$moved" = "$held" ] || [ -d "$lock" ] || mv "$new" "$lock"
        rm -rf "$new"
        continue
    fi
    if [ -n "$held" ] && [ "$patience_s" -le 0 ]; then
        printf '%s %s\\n' $((up - ${since:-0})) "$held_by"
"""
    + f"""
        exit {HELD}
    fi
    patience_s=$((patience_s - 1))
    sleep 1
done
"""
    + """
rm -rf "$store"/*.lock "$store/link.new"
ln -s . "$store/link.new" 2>/dev/null && echo links
rm -f "$store/link.new"
printf 'root %s' "$root"
"""
)

# Holds the lock while lines come in. $3: whether the folder was made for this.
KEEP = (
    _BEGIN
    + _HELD
    + """
made=$1
held() {
    held=
    read -r held 2>/dev/null <"$store/lock/holder"
    [ "$held" = "$token" ]
}
release() {
    held && mv "$store/lock" "$store/$token.lock" && rm -rf "$store/$token.lock"
    rmdir "$store/incoming" "$store" 2>/dev/null
    [ -n "$made" ] && rmdir "$root" 2>/dev/null
    exit 0
}
trap release EXIT
trap 'exit 1' HUP INT TERM
beat() {
    held || exit 1
    read -r up rest </proc/uptime
    printf '%9s\\n' "${up%%.*}" 1<>"$store/lock/beat" # in place: that works on a full disk, too
}
beat
while read -r line; do beat; done
"""
)

# Appends to a file under way. $3: its SHA-256. $4: how much of it is there. $5: its size.
RECEIVE = (
    _BEGIN
    + _HELD
    + f"""
part=$store/incoming/$1.part
mkdir -p "$store/incoming" || exit 1
count() {{ have=0; [ -f "$part" ] && have=$(wc -c <"$part"); }}
count
[ "$have" -eq "$2" ] || exit {MOVED}
cat >>"$part" || exit 1
count
[ "$have" -ge "$3" ] || exit {CUT}
digest "$part"
[ "$digest" = "$1" ] || {{ rm -f "$part"; exit {DAMAGED}; }}
mv "$part" "$store/incoming/$1"
"""
)

# Lets the executable be run before the rest is here. $3: the version. $4: where it lies now.
TRY = (
    _BEGIN
    + _HELD
    + """
new=$store/$1.partial
rm -rf "$new"
mkdir "$new" || exit 1
ln "$store/$2" "$new/model" 2>/dev/null || cp "$store/$2" "$new/model" || exit 1
chmod +x "$new/model"
"""
)

# Makes version $3 out of what standard input lists, a line per file: x where it is executable; its
# SHA-256; where it lies; which blocks of 512 bytes come before it there, where that is a pack; its
# size; its path.
ASSEMBLE = (
    _BEGIN
    + _HELD
    + f"""
id=$1 new=$store/$1.partial damaged=
shift
rm -rf "$new"
mkdir "$new" || exit 1
while read -r mode sha256 source skip size path; do
    from=$store/$source to=$new/$path
    case $path in */*) mkdir -p "${{to%/*}}" || exit 1 ;; esac
    if [ "$skip" != - ]; then
        dd if="$from" bs=512 skip="$skip" count=$(((size + 511) / 512)) 2>/dev/null |
            head -c "$size" >"$to" || exit 1
    else
        ln "$from" "$to" 2>/dev/null || cp "$from" "$to" || exit 1
    fi
    digest "$to"
    if [ "$digest" != "$sha256" ]; then
        printf '%s\\n' "$source"
        case $source in incoming/*) rm -f "$from" ;; esac
        damaged=1
    fi
    if [ "$mode" = x ]; then chmod +x "$to" || exit 1; fi
    chmod a-w "$to" 2>/dev/null
    printf '%s  %s\\n' "$sha256" "$path" >>"$new/SHA256SUMS" || exit 1
    set -- "$@" "$to"
done
[ -z "$damaged" ] || exit {DAMAGED}
digest "$new/SHA256SUMS"
case $digest in "$id"*) ;; *) exit {CUT} ;; esac
"""
    + """
chmod a-w "$new/SHA256SUMS" 2>/dev/null
set -- "$@" "$new/SHA256SUMS"
sync "$@" "$new" 2>/dev/null || sync
if [ -d "$store/$id" ]; then # damaged: its files are replaced one by one
    for file; do
        to=$store/$id/${file#"$new"/}
        digest "$file"
        wanted=$digest
        digest "$to" 2>/dev/null
        [ "$digest" != "$wanted" ] || continue
        mkdir -p "${to%/*}" && mv -f "$file" "$to" || exit 1
    done
    rm -rf "$new"
else
    mv "$new" "$store/$id" || exit 1
fi
sync "$store/$id" "$store" 2>/dev/null || sync
rm -rf "$store/incoming" "$store"/*.partial
"""
)

# Removes versions to which nothing points, but for the $3 latest; and version $4, if given, anyway;
# and what was under way.
PRUNE = (
    _BEGIN
    + _HELD
    + """
kept=$1 unwanted=$2 pointed=" "
for link in "$root"/* "$root"/.*; do
    [ -L "$link" ] || continue
    target=$(readlink "$link")
    pointed="$pointed${target##*/} "
done
for file in "$store"/*.previous "$store"/.*.previous; do
    [ -f "$file" ] || continue
    while read -r line; do pointed="$pointed$line "; done <"$file"
done
if [ "$kept" -gt 0 ]; then # else this is to make room for what is under way
    rm -rf "$store/incoming" "$store/aside" "$store"/*.partial "$store"/*.new
fi
set -f
for id in $(ls -t "$store"); do
    case $id in *[!0-9a-f]*) continue ;; esac
    [ "${#id}" -eq 16 ] && [ -d "$store/$id" ] || continue
    case $pointed in *" $id "*) continue ;; esac
    if [ "$id" = "$unwanted" ]; then
        rm -rf "${store:?}/$id"
    elif [ "$kept" -gt 0 ]; then
        kept=$((kept - 1))
    else
        rm -rf "${store:?}/$id"
    fi
done
"""
)

# Lets name $3 point to version $4. $5: where the name is a folder, as deployments once made
# it, the version that this becomes; standard input has its SHA256SUMS.
# NAME.previous has lines "ID ID-BEFORE": it is right whether or not the rename came about.
SWITCH = (
    _BEGIN
    + _HELD
    + f"""
trap '' HUP INT TERM
name=$1 id=$2 older=$3 at=$root/$1 before=
link=$store/link.new history=$store/$1.previous
[ -f "$store/$id/SHA256SUMS" ] || exit {GONE}
if [ -L "$at" ]; then
    before=$(readlink "$at")
    case $before in .edgepress/*) before=${{before#.edgepress/}} ;; *) exit {FOREIGN} ;; esac
elif [ -d "$at" ]; then
    [ -n "$older" ] || rmdir "$at" 2>/dev/null || exit {FOREIGN}
    before=$older
elif [ -e "$at" ]; then
    exit {FOREIGN}
fi
"""
    + """
remember() {
    printf '%s\\n' "$@" >"$store/previous.new" && mv -f "$store/previous.new" "$history"
}
printf 'before %s\\n' "$before"
[ "$before" != "$id" ] || [ ! -L "$at" ] || exit 0
if [ -n "$before" ] && [ "$before" != "$id" ]; then
    older_still=
    if [ -f "$history" ]; then
        while read -r key value; do
            [ "$key" != "$before" ] || older_still="$key $value"
        done <"$history"
    fi
    if [ -n "$older_still" ]; then
        remember "$id $before" "$older_still" || exit 1
    else
        remember "$id $before" || exit 1
    fi
fi
rm -f "$link"
ln -s ".edgepress/$id" "$link" || exit 1
aside=
if [ -n "$older" ] && [ -d "$at" ] && [ ! -L "$at" ]; then
    if [ -d "$store/$older" ]; then
        aside=$store/aside
        rm -rf "$aside"
    else
        cat >"$at/SHA256SUMS" || exit 1
        aside=$store/$older
    fi
    sync
    mv "$at" "$aside" || exit 1
fi
sync "$store/$id" "$store" "$history" 2>/dev/null || sync
if ! mv -f -T "$link" "$at" 2>/dev/null; then
    echo "not atomic"
    if ! ln -sfn ".edgepress/$id" "$at"; then
        [ -z "$aside" ] || mv "$aside" "$at"
        exit 1
    fi
    rm -f "$link"
fi
sync "$root" 2>/dev/null || sync
[ -z "$before" ] || [ "$before" = "$id" ] || remember "$id $before"
[ "$aside" != "$store/aside" ] || rm -rf "$aside"
exit 0
"""
)
